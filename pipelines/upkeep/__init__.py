"""Upkeep of an output: verify it, retry rejected rows, merge small files."""
