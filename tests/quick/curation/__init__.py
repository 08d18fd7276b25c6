"""Quick tests of `curation/`."""
