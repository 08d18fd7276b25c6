"""Quick tests of `pipelines/`."""
