"""The vision and the text tower, in PyTorch."""
