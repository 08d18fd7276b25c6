"""Tests: real Ray, real files, a real S3 server."""
