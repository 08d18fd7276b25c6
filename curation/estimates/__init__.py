"""Estimates about a whole output from answers about a sample of it, with their bounds."""
