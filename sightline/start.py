"""The beginning of the command line: Ctrl-C ends a command in one line also while its modules are imported."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line: the console script `sightline`."""
    try:
        from sightline.cli import app
    except KeyboardInterrupt:
        print("sightline: interrupted", file=sys.stderr)
        sys.exit(130)
    app()
