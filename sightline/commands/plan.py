"""`sightline plan`: what a run of `sightline tag` would do."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from sightline import api
from sightline.commands.skipped import print_skipped
from sightline.commands.tag import read_job
from sightline.exits import err, out, report_errors


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The job's YAML file, as for `sightline tag`.")],
    input: Annotated[
        list[str] | None, typer.Option("--input", metavar="URI", help="Replaces the config's input; may be repeated.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", metavar="URI", help="Replaces the config's output.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Replaces one key; may be repeated.")
    ] = None,
    dates: Annotated[
        list[str] | None,
        typer.Option("--date", metavar="DAY", help="A day that {date} in input stands for; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the preview as JSON.")] = False,
) -> None:
    """Show what `sightline tag CONFIG` would do: new images, shards, and about how long it would take. Writes nothing.

    The time is from the latest runs of the same output, and the price from `cost.per_hour`.
    """
    with report_errors():
        job = read_job(config, input, output, set_, dates)
        found = api.plan(job)
    if as_json:
        print(json.dumps(found.as_dict()))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row(
        "new", f"{found.new_inputs:,} inputs with about {found.new_images:,} images, in {found.new_shards:,} shards"
    )
    table.add_row("known", f"{found.known_inputs:,} inputs are planned already")
    table.add_row("to do", f"{found.shards:,} shards with about {found.images:,} images")
    if found.hours is None:
        table.add_row("time", "not known: no run of this output has ended")
    else:
        limit = f", limited by {found.limited_by}" if found.limited_by else ""
        took = format_time(3600 * found.hours)
        table.add_row("time", f"about {took} at {found.images_per_second:,.3g} images/s{limit}")
    if found.cost is not None:
        table.add_row("cost", f"about {found.cost:,.2f}")
    out.print(table)
    print_skipped(Counter(found.skipped), found.skipped_examples)
    if not found.new_inputs and not found.known_inputs and not found.waiting:
        err.print(f"nothing is under {escape(', '.join(job.list_inputs()))} now", highlight=False)
    for item in found.waiting[:10]:
        err.print(escape(f"waits: {item.detail}"), highlight=False)
    if len(found.waiting) > 10:
        err.print(f"and {len(found.waiting) - 10:,} more wait", highlight=False)


def format_time(seconds: float) -> str:
    """Return a length of time in the largest unit of which there are two: `45 seconds`, `12 minutes`, `3.2 hours`."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
