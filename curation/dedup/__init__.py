"""Copies among the images of an output, and images of one output that are copies of another's."""
