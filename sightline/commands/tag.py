"""`sightline tag`: run a batch job, print a summary, and choose the exit code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pipelines.config import JobConfig, load_config
from pipelines.limit import NO_LIMIT, Limit
from pipelines.planning.listing import Waiting
from sightline.commands.skipped import print_skipped
from sightline.exits import FAILED, GO_ON, TOO_MANY_REJECTS, err, out, report_errors
from sightline.indexing import check_index, describe_built, index_output
from sightline.progress import RunProgress
from siglip.checkpoints.fidelity import Fidelity
from siglip.images.rejection import REASONS, RENAMED
from storage.schemes import is_remote
from storage.settings import ConfigError, list_keys, parse_override
from storage.store import StoreError


def describe_keys(keys: Iterable[tuple[str, str, str]]) -> str:
    """The keys of a configuration, each with its default and meaning, for the end of a command's help."""
    return "Keys of CONFIG\n\n" + "\n\n".join(escape(f"{key} ({default}): {text}") for key, default, text in keys)


SCHEMA_HELP = describe_keys(list_keys(JobConfig))
"""Every key of a job's configuration, as `sightline tag --help` shows it."""


def tag(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The job's YAML file; configs/ has examples.")],
    reasons: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[REASON]...",
            help="With --retry-rejects: retry only rows rejected for these reasons. Default: all.",
            show_default=False,
        ),
    ] = None,
    input: Annotated[
        list[str] | None, typer.Option("--input", metavar="URI", help="Replaces the config's input; may be repeated.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", metavar="URI", help="Replaces the config's output.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY.PATH=VALUE", help="Replaces one key, such as actors.max=4; may be repeated."
        ),
    ] = None,
    retry_rejects: Annotated[
        bool,
        typer.Option("--retry-rejects", help="Also retry rejected rows: all, or those of the REASONs given."),
    ] = False,
    dates: Annotated[
        list[str] | None,
        typer.Option(
            "--date",
            metavar="DAY",
            help="A day that {date} in input stands for: today, yesterday (UTC) or YYYY-MM-DD; may be repeated. "
            "Default: today and yesterday.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="IMAGES", min=1, help="Begin no further shard after about so many images."),
    ] = None,
    for_: Annotated[
        str | None,
        typer.Option("--for", metavar="TIME", help="Begin no further shard after this time: 90m, 6h or 2d."),
    ] = None,
    newest_first: Annotated[
        bool, typer.Option("--newest-first", help="Do the shards first that were planned last.")
    ] = False,
) -> None:
    """Tag and embed every image under the input that is not yet in the output.

    Run it again after a kill, a crash, or when there are new images: it does what is not yet committed, and nothing
    twice.

    --limit and --for do a part of the work, for a backfill that goes on night by night. Exit code 0 then says that the
    part is done; a line says what is left.

    Exit codes: 0 all shards are committed; 1 run it again: the run failed, or some inputs could not be read now and
    their shards wait, or hosts of images on the web were in trouble, or the table (`table: delta`) or the index
    (`index: true`) could not be made; 2 nothing was done: change the usage, the config, the input or the credentials;
    3 all shards are committed, but more than max_reject_fraction of the run's images were rejected; 129, 130 or 143
    interrupted.
    """
    with report_errors(GO_ON):
        if reasons and not retry_rejects:
            raise ConfigError(f"unexpected {' '.join(reasons)}: reasons go with --retry-rejects")
        if unknown := [reason for reason in reasons or [] if reason not in {**REASONS, **RENAMED}]:
            raise ConfigError(f"--retry-rejects {unknown[0]}: no such reason (known: {', '.join(REASONS)})")
        job = read_job(config, input, output, set_, dates)
        old_names = [old for old, new in RENAMED.items() if new in (reasons or [])]
        retry = [*(reasons or []), *old_names] if retry_rejects else None
        part = Limit(limit, None if for_ is None else parse_time(for_), newest_first)
        raise typer.Exit(run_and_summarize(job, retry, part))


def read_job(
    config: Path,
    input: list[str] | None,
    output: str | None,
    settings: list[str] | None,
    days: list[str] | None = None,
) -> JobConfig:
    """Read a job's YAML file with the keys that options replace. Raises `ConfigError`."""
    overrides = dict(parse_override(text, JobConfig) for text in settings or [])
    if input:
        overrides["input"] = input
    if output is not None:
        if not output.strip():
            raise ConfigError("--output is empty: give a folder or an s3://, gs:// or az:// prefix")
        overrides["output"] = output
    if days:
        overrides["dates"] = [parse_day(day) for day in days]
    return load_config(config, overrides)


def parse_day(text: str) -> date:
    """Parse `today`, `yesterday` or a date as YYYY-MM-DD, in UTC. Raises `ConfigError`."""
    today = datetime.now(UTC).date()
    if text in ("today", "yesterday"):
        return today - timedelta(days=text == "yesterday")
    try:
        return datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError:
        raise ConfigError(f"{text} is no day: write today, yesterday, or a date such as 2026-11-30") from None


def parse_time(text: str) -> float:
    """Parse a length of time such as `90m`, `6h` or `2d`, in seconds. Raises `ConfigError`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not found or not float(found[1]):
        raise ConfigError(f"--for {text}: write a time such as 90m, 6h or 2d")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def run_and_summarize(job: JobConfig, retry: list[str] | None = None, limit: Limit = NO_LIMIT) -> int:
    """Run a job, show its progress on stderr and a summary on stdout, and return the exit code.

    With `retry`, rows rejected for these reasons are retried; for all reasons when it is empty.
    """
    from pipelines.job import run_job
    from sightline.metrics import RunMetrics

    check_index(job)
    with RunProgress(err) as progress:
        outcome = run_job(job, RunMetrics(progress), retry, limit)
    plan, manifest = outcome.plan, outcome.manifest
    print_skipped(plan.skipped.counts + Counter(manifest.get("skipped_members", {})), plan.skipped.examples)
    if plan.changed:
        out.print(
            f"tagged again because they changed: {plan.changed:,} inputs with about {plan.changed_rows:,} images; "
            "their earlier rows stay in the output, so a key may have several rows",
            highlight=False,
        )
    if outcome.new_shards:
        _print_summary(job, manifest)
    elif not outcome.waiting and not outcome.left:
        if not plan.inputs and not plan.known:
            err.print(f"nothing is under {escape(', '.join(job.input))} now", highlight=False)
        done = f"all {manifest['shards']} shards with {manifest['rows_in']:,} images are in {job.output}"
        none = "nothing to do" if retry is None else "no rejects of these reasons to retry"
        out.print(escape(f"{none}: {done}"), highlight=False)
    if outcome.waiting:
        _print_waiting(outcome.waiting, plan.waiting)
    if outcome.host_trouble:
        _print_trouble(job, outcome.host_trouble, outcome.trouble)
    if outcome.left:
        out.print(f"{outcome.left:,} shards are left: run the same command again", highlight=False)
    if outcome.rejected_fraction > job.max_reject_fraction:
        total = manifest["rows_rejected"] / max(1, manifest["rows_in"])
        err.print(
            f"[red]{outcome.rejected_fraction:.1%} of this run's images were rejected, over max_reject_fraction "
            f"{job.max_reject_fraction:.1%}[/red] ({total:.1%} of the whole output): see {escape(job.output)}/rejects",
            highlight=False,
        )
    for line in outcome.published:
        out.print(escape(line), highlight=False)
    if outcome.unpublished:
        err.print(f"[red]{escape(outcome.unpublished)}[/red]", highlight=False)
    indexed = _index(job, outcome.manifest, outcome.new_shards)
    waits = outcome.waiting or (outcome.host_trouble and job.fetch.enabled)
    if waits or outcome.unpublished or not indexed:
        return FAILED
    return TOO_MANY_REJECTS if outcome.rejected_fraction > job.max_reject_fraction else 0


def _index(job: JobConfig, manifest: dict[str, Any], new_shards: int) -> bool:
    """Bring the index up to the output if the job asks for it, and say so. Return whether nothing failed."""
    try:
        built = index_output(job, manifest, new_shards, lambda line: err.print(escape(line), highlight=False))
    except StoreError as error:
        err.print(f"[red]{escape(' '.join(str(error).split()))}[/red]", highlight=False)
        return False
    if built is not None:
        out.print(describe_built(built), highlight=False)
    return True


_MANY_FILES = 1000
"""From so many shards on, the summary names a reader that takes little memory for each file. For 98,000 files,
`pyarrow.dataset` takes 4.3 GB, and DuckDB 0.5."""
_HOSTS = 10
"""How many hosts with trouble are named."""
_EXAMPLES = 3
"""How many inputs that wait for one reason are named."""


def _print_waiting(waiting: list[Waiting], unplanned: Collection[Waiting]) -> None:
    """Print what could not be read now, by reason, with a few examples of each reason. `unplanned` are inputs."""
    images = sum(item.rows for item in waiting)
    holding = f", with about {images:,} images" if images else ""  # what is in a closed folder is not known
    inputs = sum(item in unplanned for item in waiting)
    shards = sum(item.shards for item in waiting) - inputs
    counted = ((shards, "shard"), (inputs, "input"))
    told = " and ".join(f"{count:,} {noun}{'s' if count > 1 else ''}" for count, noun in counted if count)
    err.print(
        f"[red]waiting: {told}{holding}[/red]; the rest is committed. Run the same command again when the reasons "
        "below are gone",
        highlight=False,
    )
    counts: Counter[str] = Counter()
    for item in waiting:
        counts[item.reason] += item.shards
    for reason, count in counts.most_common():
        details = [item.detail for item in waiting if item.reason == reason]
        more = f"; and {len(details) - _EXAMPLES:,} more" if len(details) > _EXAMPLES else ""
        details = details[:_EXAMPLES]
        err.print(escape(f"  {reason} {count:,}: {'; '.join(details)}{more}"), highlight=False)
    if counts["missing"]:
        err.print("  set on_missing: reject if these inputs were deleted on purpose", highlight=False)
    if counts["changed"]:
        err.print("  set on_changed: retag to tag changed inputs as they are now", highlight=False)


def _print_trouble(job: JobConfig, images: int, trouble: Counter[str]) -> None:
    """Print how many images wait because their hosts were in trouble, and the hosts with the most of them."""
    after = "the next run tries them again" if job.fetch.enabled else "set fetch.enabled: true to try them again"
    err.print(f"[red]waiting: {images:,} images whose hosts were in trouble[/red]; {after}", highlight=False)
    shown = [f"{text} {count:,}" for text, count in trouble.most_common(_HOSTS)]
    more = f"; and {len(trouble) - _HOSTS:,} more" if len(trouble) > _HOSTS else ""
    if shown:
        err.print(escape(f"  {'; '.join(shown)}{more}"), highlight=False)


def _print_summary(job: JobConfig, manifest: dict[str, Any]) -> None:
    """Print the counts of this run, the output's labels and reject reasons, and how to read the output."""
    run = manifest["run"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row(
        "this run",
        f"{run['rows']:,} images in {run['seconds']:.1f} s, {run['rows_tagged']:,} tagged, "
        f"{run['rows_rejected']:,} rejected",
    )
    limit = f" (limited by {run['limited_by']})" if run["limited_by"] else ""
    table.add_row("images/s", f"{run['images_per_second']:,.1f}{limit}")
    if "fidelity" in run:
        found = run["fidelity"]
        told = Fidelity(**found).describe() if found else "not compared with bfloat16: no image was found to compare"
        table.add_row("int8", told)
    counted = f"{manifest['rows_tagged']:,} tagged, {manifest['rows_rejected']:,} rejected"
    table.add_row("whole output", f"{manifest['rows_in']:,} images, {counted}")
    for title, key in (("  best labels", "top_labels"), ("  rejects", "reasons")):
        counts: dict[str, int] = manifest[key]
        shown = [f"{escape(name)} {count:,}" for name, count in list(counts.items())[:8]]
        more = f", and {len(counts) - 8} more" if len(counts) > 8 else ""
        table.add_row(title, (", ".join(shown) or "none") + more)
    table.add_row("output", escape(job.output))
    out.print(table)
    reader = f"pyarrow.dataset.dataset({job.output.rstrip('/') + '/data'!r}).to_table().slice(0, 5).to_pandas()"
    if is_remote(job.output) or manifest["shards"] > _MANY_FILES:
        reader = f"duckdb.sql(\"from '{job.output.rstrip('/')}/data/*.parquet' limit 5\")"
    out.print(f"read it: [bold]{escape(reader)}[/bold]", highlight=False)
