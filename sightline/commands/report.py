"""`sightline report`: an output as a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sightline.exits import out, report_errors


def report(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A finished output of `sightline tag`.")],
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="The page.")] = Path("report.html"),
    dollars_per_hour: Annotated[
        float | None, typer.Option(min=0, help="What the cluster costs, for the cost of 1,000 images.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What `sightline evaluate --json` printed about this output.")
    ] = None,
) -> None:
    """Write a page about an output: totals, what limited the run, each label's scores and images, rejects.

    One file that needs no network; of more than a hundred labels the rest stand on pages beside it.
    """
    with report_errors():
        from curation.report.page import read_evaluation, write_report
        from curation.report.statistics import compute_statistics
        from curation.tagged_output import open_output

        source = open_output(output)
        judged = read_evaluation(evaluation) if evaluation else None
        written = write_report(source, compute_statistics(source), to, dollars_per_hour, judged)
        size = sum(path.stat().st_size for path in written) / 2**20
        more = f" and {len(written) - 1} more pages" if len(written) > 1 else ""
        out.print(escape(f"{written[0]}{more}, {size:.1f} MiB"), highlight=False)
