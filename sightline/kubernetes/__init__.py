"""What runs in a Kubernetes cluster beside the batch job and the endpoint."""
