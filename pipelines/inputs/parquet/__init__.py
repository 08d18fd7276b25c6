"""The input format Parquet: files with an image column."""

from pipelines.inputs.parquet.file import KIND, inspect, read, recognizes

__all__ = ["KIND", "inspect", "read", "recognizes"]
