"""Samples: choose the images that a person should check, and keep them in files."""
