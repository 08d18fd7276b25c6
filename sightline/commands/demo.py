"""`sightline demo`: a first run, without a checkpoint to download and without images of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pipelines.config import load_config
from sightline import api
from sightline.commands.tag import run_and_summarize
from sightline.exits import FAILED, GO_ON, out, report_errors


def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to put the images and the output.")] = Path(
        "demo"
    ),
) -> None:
    """Render a small image dataset, tag it with the checkpoint that ships with Sightline, and verify the output."""
    from sightline.demo.dataset import CONFIG, render_dataset

    with report_errors(GO_ON):
        images, output = folder / "input", folder / "output"
        out.print(f"images in {images}", highlight=False)
        render_dataset(images)
        job = load_config(CONFIG, {"input": [str(images)], "output": str(output)})
        code = run_and_summarize(job)
        report = api.verify(output)
        verdict = "[green]ok[/green]" if report.ok else "[red]not ok[/red]"
        out.print(
            f"verify: {verdict}, {report.rows_in} rows in = {report.rows_tagged} tagged + {report.rows_rejected} "
            f"rejected, {report.duplicates} doubled, {report.missing} missing",
            highlight=False,
        )
        page = folder / "report.html"
        out.print(
            f"see it: [bold]sightline report {escape(str(output))} --to {escape(str(page))}[/bold], then open {page}",
            highlight=False,
        )
        raise typer.Exit(code or (0 if report.ok else FAILED))
