"""Tests that need an S3 server: storage, and inputs read from it."""
