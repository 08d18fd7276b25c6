"""Tests of the endpoint on a real Ray Serve: they start Ray and take minutes."""
