"""Tests that need time: whole models."""
