"""`sightline report`: write a web page about an output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sightline.commands.outputs import open_reported
from sightline.exits import out, report_errors


def report(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A finished output of `sightline tag`.")],
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="The HTML file to write.")] = Path("report.html"),
    dollars_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price of the cluster; the page then shows the cost of 1,000 images.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Output of `sightline evaluate --json` for OUTPUT.")
    ] = None,
) -> None:
    """Write an HTML report on an output: totals, throughput, each label's scores and example images, rejects.

    One file that loads nothing from the network. With more than 100 labels, the other labels are on pages in a folder
    beside it.
    """
    with report_errors():
        from curation.report.page import read_evaluation, write_report
        from curation.report.statistics import compute_statistics

        source = open_reported(output)
        metrics = read_evaluation(evaluation) if evaluation else None
        written = write_report(source, compute_statistics(source), to, dollars_per_hour, metrics)
        size = sum(path.stat().st_size for path in written) / 2**20
        more = f" and {len(written) - 1} more pages" if len(written) > 1 else ""
        out.print(escape(f"{written[0]}{more}, {size:.1f} MiB"), highlight=False)
