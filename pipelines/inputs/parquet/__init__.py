"""The input format Parquet: files with an image column, and files of URLs, which are lists."""

from pipelines.inputs.parquet.file import KIND, inspect, read, recognizes
from pipelines.inputs.parquet.urls import open_list

__all__ = ["KIND", "inspect", "open_list", "read", "recognizes"]
