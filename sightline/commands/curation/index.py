"""`sightline index`: an index of an output for repeated searches."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from sightline.commands.outputs import open_reported
from sightline.exits import err, out, report_errors


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
        parts = [f"{built.rows:,} images in the index, {built.added:,} added"]
        if built.removed:
            parts.append(f"{built.removed:,} replaced or removed")
        if built.trained:
            parts.append(f"trained, because {built.trained}")
        parts.append(
            f"searches find {built.recall_images:.1%} of the ten nearest images of an image, and "
            f"{built.recall_texts:.1%} of a text"
        )
        out.print("; ".join(parts), highlight=False)
