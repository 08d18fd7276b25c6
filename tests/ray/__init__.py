"""What needs a Ray."""
