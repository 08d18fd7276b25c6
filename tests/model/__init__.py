"""Tests that load whole models. They take longer than the quick tests."""
