"""`sightline export`: hand the images of an output on to another tool, in that tool's format."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sightline.commands.outputs import open_reported
from sightline.exits import FAILED, err, out, report_errors

_SECONDS = 10.0
"""Seconds between two lines about the progress."""


class To(StrEnum):
    """The targets: `curation.export.export.TARGETS`, which is slow to import."""

    fiftyone = "fiftyone"
    hf = "hf"
    imagefolder = "imagefolder"
    webdataset = "webdataset"
    lancedb = "lancedb"
    qdrant = "qdrant"
    coco = "coco"
    xmp = "xmp"


def export(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A finished output of `sightline tag`.")],
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DESTINATION",
            help="A new or empty folder. coco: a new file. qdrant: also http(s)://host:port/collection.",
        ),
    ],
    to: Annotated[To, typer.Option(help="The format.")],
    where: Annotated[
        str | None,
        typer.Option(metavar="SQL", help="Only images for which this holds: \"list_contains(labels, 'cat')\"."),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Only these images: a text file with a key or an id in each line, or a Parquet file with a column id "
            "or key.",
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="A folder or s3://, gs:// or az:// prefix that holds the image files by key. Images that are not "
            "there are read where they were tagged, if they are single files.",
        ),
    ] = None,
    thumbnails: Annotated[
        bool, typer.Option("--thumbnails", help="Write thumbnails of images that are not in --images.")
    ] = False,
) -> None:
    """Write the images of an output, with their labels, scores and embeddings, for another tool.

    fiftyone, imagefolder and webdataset need image files; hf and lancedb contain images with --images or --thumbnails.
    Ends with exit code 1 if images were left out because they have no file.
    """
    with report_errors():
        from curation.export.export import export_output

        done = export_output(
            open_reported(output),
            to.value,
            destination,
            where=where,
            keep=keep,
            images=images,
            thumbnails=thumbnails,
            progress=_Lines(),
        )
        for notice in done.notices:
            err.print(escape(notice), highlight=False)
        if done.without_file:
            more = ", ..." if done.without_file > len(done.missing) else ""
            err.print(
                escape(f"{done.without_file:,} images have no file: {', '.join(done.missing)}{more}"), highlight=False
            )
        out.print(escape(str(done)), highlight=False)
        if done.without_file:
            raise typer.Exit(FAILED)


class _Lines:
    """Prints a line about the progress every few seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _SECONDS

    def update(self, rows: int) -> None:
        """Print the number of images if it is time to."""
        if time.monotonic() >= self._next:
            err.print(f"{rows:,} images", highlight=False)
            self._next = time.monotonic() + _SECONDS
