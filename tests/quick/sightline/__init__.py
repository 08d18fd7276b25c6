"""Quick tests of `sightline/` and the documentation."""
