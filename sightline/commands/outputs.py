"""Outputs that commands read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from sightline.exits import err

if TYPE_CHECKING:
    from curation.tagged_output import TaggedOutput


def open_reported(uri: str) -> TaggedOutput:
    """Open a finished output, and print to stderr if inputs wait that are not in it. Raises what `open_output` does."""
    from curation.tagged_output import open_output

    output = open_output(uri)
    if waiting := output.describe_waiting():
        err.print(escape(waiting), highlight=False)
    return output
