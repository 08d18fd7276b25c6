"""Quick tests of `siglip/`."""
