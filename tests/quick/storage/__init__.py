"""Quick tests of `storage/`."""
