"""Tests of the endpoint on a real Ray Serve."""
