"""Inputs of the batch job: listing them, planning shards, reading each format."""
