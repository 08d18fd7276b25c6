"""`sightline dedup`: find the copies among an output's images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sightline.commands.outputs import open_reported
from sightline.exits import err, out, report_errors


def dedup(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A finished output of `sightline tag`.")],
    to: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the result. An earlier result there is continued.")
    ],
    against: Annotated[
        str | None,
        typer.Option(metavar="OTHER", help="Find images of OUTPUT that are copies of images of this other output."),
    ] = None,
    prefer: Annotated[
        str,
        typer.Option(help="Which copy is kept: largest, newest, or a pattern of keys such as 'originals/*'."),
    ] = "largest",
    copy: Annotated[
        float, typer.Option(min=0.5, max=1, help="Lowest cosine of copies, whose thumbnails are compared too.")
    ] = 0.85,
    similar: Annotated[
        float, typer.Option(min=0.5, max=1, help="Lowest cosine of images that are told to be similar.")
    ] = 0.95,
) -> None:
    """Find the copies among OUTPUT's images: identical bytes, confirmed copies, and images that are only similar.

    A copy has the same picture: encoded again, resized, cropped a little, with a watermark. It is confirmed by the
    thumbnails, so that it is safe to drop. Similar images are reported, and kept. DIR gets `groups.parquet` and
    `keep.txt`, the ids of the images to keep, which `sightline export --keep` takes. Run it again after a night: the
    new images are compared with all, and what was kept before stays.
    """
    with report_errors():
        from curation.dedup.result import dedup_output

        opened = open_reported(output)
        other = None if against is None else open_reported(against)
        err.print(f"comparing {opened.rows + (other.rows if other else 0):,} images ...", highlight=False)
        done = dedup_output(opened, to, other, prefer=prefer, copy=copy, similar=similar)
        if not done.confirmed:
            err.print(
                "there are no thumbnails, so that no copies can be confirmed: set thumbnails in the job",
                highlight=False,
            )
        of = f" of {escape(other.uri)}" if other else ""
        out.print(
            f"{done.rows:,} images, {done.new:,} of them new: {done.identical:,} identical and {done.copies:,} copies"
            f"{of}, {done.similar:,} similar; {done.keep:,} to keep are in {escape(str(to / 'keep.txt'))}",
            highlight=False,
        )
