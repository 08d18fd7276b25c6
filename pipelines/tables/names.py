"""How a configuration names the table of an output."""

from __future__ import annotations

import re

DELTA = "delta"
ICEBERG = re.compile(r"iceberg:(?P<catalog>[^/:\s]+)/(?P<namespace>[^/\s]+)\.(?P<table>[^/.\s]+)")
TABLE_NAMES = "delta, or iceberg:CATALOG/NAMESPACE.TABLE such as iceberg:prod/photos.images"
"""What a table may be named, for messages."""


def is_table(name: str) -> bool:
    """Tell whether a configuration may name a table so."""
    return name == DELTA or ICEBERG.fullmatch(name) is not None
