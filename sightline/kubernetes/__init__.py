"""What runs on Kubernetes beside the batch job: the launcher of its RayJobs."""
