"""Object stores for tests: a real S3 server, and proxies that fail or delay."""
