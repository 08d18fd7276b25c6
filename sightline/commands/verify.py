"""`sightline verify`: check an output, and print the report."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from sightline import api
from sightline.exits import FAILED, err, out, report_errors


def verify(
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="The output of `sightline tag`: a folder or s3:// prefix.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    remove_orphans: Annotated[
        bool,
        typer.Option("--remove-orphans", help="Delete files that no commit names. Not while a run writes the output."),
    ] = False,
) -> None:
    """Verify an output by reading all its files: every planned row is there exactly once, and no file has changed.

    Exits with 0 only if all of this holds. An S3 endpoint other than AWS comes from AWS_ENDPOINT_URL.
    """
    with report_errors():
        report = api.verify(output, remove_orphans=remove_orphans)
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        table = Table(show_header=False, box=None)
        for name, value in report.as_dict().items():
            if name != "problems":
                table.add_row(name.replace("_", " "), str(value).lower() if isinstance(value, bool) else f"{value:,}")
        out.print(table)
        for problem in report.problems:
            err.print(f"[red]-[/red] {escape(problem)}", highlight=False)
    raise typer.Exit(0 if report.ok else FAILED)
