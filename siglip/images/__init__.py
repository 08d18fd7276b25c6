"""Encoded images to the pixels that the model takes."""
