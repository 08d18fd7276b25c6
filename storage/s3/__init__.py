"""The store for S3 and for other servers with its protocol."""
