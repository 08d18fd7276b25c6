"""The checkpoint that ships with Sightline, and checkpoints with random weights."""
