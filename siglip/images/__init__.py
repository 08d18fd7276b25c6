"""Decoding and resizing: encoded images to the pixels that the model takes."""
