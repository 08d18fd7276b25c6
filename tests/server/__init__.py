"""What needs a server on loopback: the endpoint, or an S3 server."""
