"""`sightline index`: an index of an output for repeated searches."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from sightline.commands.outputs import open_reported
from sightline.exits import err, out, report_errors
from sightline.indexing import describe_built


def index(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A finished output of `sightline tag`.")],
) -> None:
    """Make or update the index of OUTPUT, in OUTPUT/index/, for `sightline search --index`.

    Run it again after a night: only new images are added. Searches use the earlier index meanwhile, and one that is
    interrupted goes on where it was. Then it is measured how many of the ten nearest images the index finds, for images
    and for the prompts of OUTPUT's labels, against an exact scan. The index is trained anew if that is less than 95 %,
    or the images have doubled. It needs the package lancedb, and as much space as the embeddings and a quarter more.
    """
    with report_errors():
        from curation.index.build import build_index

        opened = open_reported(output)
        built = build_index(opened, lambda line: err.print(escape(line), highlight=False))
        out.print(describe_built(built), highlight=False)
