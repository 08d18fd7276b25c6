"""The `sightline` command: the batch job and the endpoint under one name."""
