"""`sightline verify`, `status`, `compact`, `publish` and `upgrade`: the upkeep of an output."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from sightline import api
from sightline.commands.tag import parse_day
from sightline.exits import FAILED, GO_ON, err, out, report_errors
from sightline.progress import RunProgress
from storage.settings import ConfigError


def verify(
    output: Annotated[
        str,
        typer.Argument(
            metavar="OUTPUT", help="The output of `sightline tag`: a folder or s3://, gs:// or az:// prefix."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    remove_orphans: Annotated[
        bool,
        typer.Option("--remove-orphans", help="Delete files that no commit names. Not while a run writes the output."),
    ] = False,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="DATE",
            help="Read only what was committed since the begin of this day (UTC): today, yesterday or YYYY-MM-DD.",
        ),
    ] = None,
) -> None:
    """Verify an output by reading all its files: every planned row is there exactly once, and no file has changed.

    A table of the output has to be up to date, by its own notes. Exits with 0 only if all of this holds. With --since,
    it is checked for the shards that were committed since then.

    An S3 endpoint other than AWS comes from AWS_ENDPOINT_URL.
    """
    with report_errors():
        if since is not None and remove_orphans:
            raise ConfigError("--remove-orphans: leave --since out, because all files have to be compared")
        day = None if since is None else parse_day(since)
        if day is not None and day > datetime.now(UTC).date():
            raise ConfigError(f"--since {since}: this day has not begun (UTC), so that nothing would be verified")
        report = api.verify(output, remove_orphans=remove_orphans, since=day)
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


def status(
    output: Annotated[
        str,
        typer.Argument(
            metavar="OUTPUT", help="The output of `sightline tag`: a folder or s3://, gs:// or az:// prefix."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the status as JSON.")] = False,
) -> None:
    """Show what is planned, committed and waiting in an output, why rows were rejected, and the latest runs.

    Reads the manifest, and not the data. Exits with 0 also if something waits.
    """
    with report_errors():
        found = api.status(output)
    if as_json:
        print(json.dumps(found.as_dict()))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("shards", f"{found.committed:,} committed of {found.planned:,} planned")
    table.add_row("images", f"{found.rows_in:,}: {found.rows_tagged:,} tagged, {found.rows_rejected:,} rejected")
    if found.reasons:
        told = ", ".join(f"{reason} {count:,}" for reason, count in found.reasons.items())
        table.add_row("rejected", told)
    for reason, count in found.waiting.items():
        table.add_row("waiting", escape(f"{reason} {count:,}, such as {'; '.join(found.examples[reason])}"))
    for name, why in found.tables.items():
        table.add_row("table", escape(f"{name}: {why or 'up to date'}"))
    for time in found.under_way:
        table.add_row("at work", f"a run since {time}, unless it was killed on another machine")
    for time in found.killed:
        table.add_row("killed", f"a run of {time}; the next run takes up its work")
    out.print(table)
    if found.runs:
        out.print(_show_runs(found.runs))


def _show_runs(runs: list[dict[str, Any]]) -> Table:
    costs = any(run.get("cost") is not None for run in runs)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("run", "hours", "images", "rejected", "images/s", "limited by", *(["cost"] if costs else [])):
        table.add_column(name, justify="left" if name in ("run", "limited by") else "right")
    for run in runs:
        cells = [
            str(run.get("started_at", "")),
            f"{run.get('hours', 0):.2f}",
            f"{run.get('rows', 0):,}",
            f"{run.get('rows_rejected', 0):,}",
            f"{run.get('images_per_second', 0):,.1f}",
            run.get("limited_by") or "",
        ]
        if costs:
            cells.append("" if run.get("cost") is None else f"{run['cost']:,.2f}")
        table.add_row(*cells)
    return table


def compact(
    output: Annotated[
        str,
        typer.Argument(
            metavar="OUTPUT", help="The output of `sightline tag`: a folder or s3://, gs:// or az:// prefix."
        ),
    ],
) -> None:
    """Merge the small files of an output into files of up to 256 MiB.

    Every run adds files, and readers of a folder need time for each of them. No row changes, and each row stays there
    once. Runs may write to the output meanwhile. Programs that read the files of the folder, without the ledgers, may
    see rows twice while this command works.
    """
    with report_errors(GO_ON):
        with RunProgress(err) as progress:
            done = api.compact(output, progress)
        out.print(
            f"{done.before:,} files before, {done.after:,} now; {done.bytes / 1e6:,.1f} MB were written",
            highlight=False,
        )
        if done.kept:
            err.print(
                f"{done.kept:,} groups of files stay as they are, because a run changed one of their shards: run the "
                "command again",
                highlight=False,
            )


def publish(
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="The output of `sightline tag`: a folder or s3:// prefix.")
    ],
    table: Annotated[
        str | None,
        typer.Argument(
            metavar="[TABLE]",
            help="delta, or iceberg:CATALOG/NAMESPACE.TABLE. Default: the tables that it has, or delta.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Bring the tables of an output up to it, for Spark, Trino, DuckDB, Polars and others: docs/tables.md.

    `sightline tag` with `table: delta` does the same after each run. Nothing is copied: the table names the files of
    the output. From then on, every command that changes the output's files brings the table up to it.
    """
    with report_errors("what is committed stays, run the same command again"):
        lines = api.publish(output, table)
        for line in lines or [f"nothing to do: the table has all that is in {output}"]:
            out.print(escape(line), highlight=False)


def upgrade(
    output: Annotated[
        str,
        typer.Argument(
            metavar="OUTPUT", help="An output of an earlier version: a folder or s3://, gs:// or az:// prefix."
        ),
    ],
) -> None:
    """Bring an output of an earlier version to this one: list its commits in a ledger, and write the manifest anew.

    `sightline tag` does the same. It takes one small read for each committed shard. No data file is written.
    """
    with report_errors(GO_ON):
        shards = api.upgrade(output)
        out.print(escape(f"{output} has {shards:,} committed shards in its ledgers"), highlight=False)
