"""Hidden names: files and folders that tools keep beside the data, and that are no inputs.

Names that begin with a dot are hidden, as in Spark, Hadoop, Hive and pyarrow. Those hide every name that begins with an
underscore too. Here only the names that such tools write are hidden, because people also name folders `_photos`.
"""

from __future__ import annotations

import re

_DOTS = r"\.(?!\.?(?:/|$))"
"""The start of a name with a dot, other than `.` and `..`, which keys of an object store may contain."""
_TOOLS = (
    # Spark, Hadoop, Delta Lake, Databricks, Python
    r"_temporary|_success|_(?:common_)?metadata|_(?:committed|started)_\d+|_spark_metadata|_symlink_format_manifest"
    r"|_delta_log|_delta_index|_change_data|__pycache__"
    # macOS, Windows, ext4; Synology and QNAP
    r"|__macosx|\$recycle\.bin|recycler|system volume information|lost\+found|lost\.dir"
    r"|@eadir|#recycle|#snapshot|@recycle|@recently-snapshot|@__thumb|@tmp|~snapshot"
)
# The first letters are looked at first: with a million names, the alternatives would take seconds.
_HIDDEN = re.compile(rf"(?:^|/)(?=[._#$@~rls])(?:{_DOTS}|(?:{_TOOLS})(?:/|$))", re.IGNORECASE | re.ASCII)


def is_hidden(path: str) -> bool:
    """Tell whether a path's file, or a folder in it, is hidden. `path` is relative to the configured input."""
    return _HIDDEN.search(path) is not None
