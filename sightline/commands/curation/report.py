"""`sightline report`: write a web page about an output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sightline.commands.outputs import open_reported
from sightline.exits import err, out, report_errors


def report(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A finished output of `sightline tag`.")],
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="The HTML file to write.")] = Path("report.html"),
    dollars_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price of the cluster; the page then shows the cost of 1,000 images.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Output of `sightline evaluate --json` for OUTPUT.")
    ] = None,
    sample: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="The folder of a sample, to tell how far its review is. Repeat for more."),
    ] = None,
    audit: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="The folder of an audit of OUTPUT, to tell its result. Repeat for more."),
    ] = None,
) -> None:
    """Write an HTML report on an output: what was accepted and how much of it is right, each label's scores and images.

    It tells which steps of the work are done, and the command for those that are not.
    One file that loads nothing from the network. With more than 100 labels, the other labels are on pages in a folder
    beside it.
    """
    with report_errors():
        from curation.report.figures import read_evaluation
        from curation.report.page import Findings, write_report
        from curation.report.statistics import compute_statistics
        from curation.report.steps import describe_steps, read_audits, read_sample_state

        source = open_reported(output)
        metrics = read_evaluation(evaluation, source) if evaluation else None
        samples = [read_sample_state(folder, source) for folder in sample or []]
        audits = [read_sample_state(folder, source) for folder in audit or []]
        results, notices = read_audits(source, audits)
        for notice in notices:
            err.print(escape(notice), highlight=False)
        findings = Findings(metrics, describe_steps(source, samples, audits, metrics), results)
        written = write_report(source, compute_statistics(source), to, dollars_per_hour, findings)
        size = sum(path.stat().st_size for path in written) / 2**20
        more = f" and {len(written) - 1} more pages" if len(written) > 1 else ""
        out.print(escape(f"{written[0]}{more}, {size:.1f} MiB"), highlight=False)
