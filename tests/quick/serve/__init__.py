"""Quick tests of `serve/`."""
