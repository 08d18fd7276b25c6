"""`sightline ...`: what a user types. Parses, calls, prints and picks the exit code; decides nothing else."""

from __future__ import annotations

import json
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pipelines.config import JobConfig, absolute, load_config
from pipelines.inputs.listing import Waiting
from sightline.commands import labels
from sightline.commands.quality import calibrate, evaluate, probe
from sightline.commands.report import report
from sightline.commands.retag import retag
from sightline.commands.review import review, sample
from sightline.exits import FAILED, TOO_MANY_REJECTS, err, out, report_errors
from sightline.progress import RunProgress
from siglip.images.decode import REASONS
from storage.schemes import is_remote
from storage.settings import ConfigError, list_keys, parse_override

SCHEMA_HELP = "Keys of CONFIG\n\n" + "\n\n".join(
    escape(f"{key} ({default}): {text}") for key, default, text in list_keys(JobConfig)
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tag and embed images with SigLIP on Ray.",
)
model_app = typer.Typer(no_args_is_help=True, help="Make checkpoints.")
app.add_typer(model_app, name="model")
key_app = typer.Typer(no_args_is_help=True, help="Make API keys for the endpoint.")
app.add_typer(key_app, name="key")
app.add_typer(labels.app, name="labels")


class Arch(StrEnum):
    """The architectures that `model init` knows."""

    base = "base"
    tiny = "tiny"


def main() -> None:
    """The console script."""
    app()


@app.command(epilog=SCHEMA_HELP)
def tag(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The job's YAML file; configs/ has examples.")],
    reasons: Annotated[
        list[str] | None,
        typer.Argument(metavar="[REASON]...", help="With --retry-rejects: which. None is all.", show_default=False),
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
        typer.Option("--retry-rejects", help="Take up rejected rows again: all, or those of the REASONs named."),
    ] = False,
) -> None:
    """Tag and embed every image under the input that is not yet in the output.

    Run it again after anything: a kill, a crash, new images. It does what is not yet committed and nothing twice.

    Exit codes: 0 all shards committed; 1 run it again: the run failed, or some inputs could not be read now and their
    shards wait; 2 change the usage, config, input or credentials, nothing was done; 3 all committed, but more than
    max_reject_fraction of the run's images were rejected; 130 or 143 interrupted.
    """
    with report_errors():
        if reasons and not retry_rejects:
            raise ConfigError(f"unexpected {' '.join(reasons)}: reasons go with --retry-rejects")
        if unknown := [reason for reason in reasons or [] if reason not in REASONS]:
            raise ConfigError(f"--retry-rejects {unknown[0]}: no such reason (known: {', '.join(REASONS)})")
        overrides = dict(parse_override(text) for text in set_ or [])
        if input:
            overrides["input"] = input
        if output:
            overrides["output"] = output
        job = load_config(config, overrides)
        raise typer.Exit(_tag(job, reasons or [] if retry_rejects else None))


@app.command()
def verify(
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="The output of `sightline tag`: a folder or s3:// prefix.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    remove_orphans: Annotated[
        bool, typer.Option("--remove-orphans", help="Delete files that no commit names. Not while a run is under way.")
    ] = False,
) -> None:
    """Recount an output from its files: every planned row there, once, in files that nobody changed.

    Exits with 0 only if all of it holds. An S3 endpoint other than AWS comes from AWS_ENDPOINT_URL.
    """
    from pipelines.output.verify import verify_output
    from storage.schemes import open_store
    from storage.store import StoreError, StoreOptions

    with report_errors():
        root = absolute(output).rstrip("/")
        try:
            store = open_store(root, StoreOptions.from_environment())
            report = verify_output(store, root, remove_orphans=remove_orphans)
        except StoreError as error:
            raise ConfigError(str(error)) from error
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


@app.command()
def serve(
    config: Annotated[
        Path, typer.Argument(help="The endpoint's YAML file, such as configs/endpoint.yaml.", show_default=False)
    ],
    host: Annotated[str, typer.Option(help="Where to listen. Without API keys: loopback only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> None:
    """Serve the endpoint on this machine: the API, and a page to try it.

    Prints the URL when the first request would be answered warm. Ctrl-C finishes what is in flight, and stops.
    """
    from sightline.commands.serving import prepare_endpoint, run_endpoint

    def say_ready(url: str, metrics: str) -> None:
        out.print(f"ready: [bold]{escape(url)}[/bold] (API: {escape(url)}/docs, metrics: {metrics})", highlight=False)

    with report_errors():
        endpoint = prepare_endpoint(config, host, port)
        err.print(f"loading {escape(endpoint.model_name())} ...", highlight=False)
        run_endpoint(endpoint, host, port, say_ready)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to put the images and the output.")] = Path(
        "demo"
    ),
) -> None:
    """Render a small image dataset, tag it with the checkpoint that ships with Sightline, verify, and sum up."""
    from pipelines.output.verify import verify_output
    from sightline.demo.dataset import CONFIG, render_dataset
    from storage.schemes import open_store
    from storage.store import StoreOptions

    with report_errors():
        images, output = folder / "input", folder / "output"
        out.print(f"images in {images}", highlight=False)
        render_dataset(images)
        job = load_config(CONFIG, {"input": [str(images)], "output": str(output)})
        code = _tag(job)
        report = verify_output(open_store(str(output), StoreOptions()), str(output))
        verdict = "[green]ok[/green]" if report.ok else "[red]not ok[/red]"
        out.print(
            f"verify: {verdict}, {report.rows_in} rows in = {report.rows_tagged} tagged + {report.rows_rejected} "
            f"rejected, {report.duplicates} doubled, {report.missing} missing",
            highlight=False,
        )
        raise typer.Exit(code or (0 if report.ok else FAILED))


for command in (sample, review, calibrate, probe, retag, evaluate, report):
    app.command()(command)


@model_app.command("init")
def model_init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; must be empty or new.")],
    arch: Annotated[
        Arch, typer.Option(help="base is siglip-base-patch16-256; tiny is that of the shipped checkpoint.")
    ],
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Write a checkpoint with random weights in the hub's file layout: for benchmarks, and to try the loading path."""
    from siglip.checkpoints.architectures import init_checkpoint

    with report_errors():
        try:
            count = init_checkpoint(directory, arch.value, seed)
        except OSError as error:
            raise ConfigError(str(error)) from error
        out.print(f"{directory}: {arch.value}, {count:,} parameters, random weights (seed {seed})", highlight=False)


@key_app.command("new")
def key_new(name: Annotated[str, typer.Argument(help="Whose key it is; shown in logs and metrics.")]) -> None:
    """Make an API key. Prints the line for auth.keys_file to stdout, and the key itself, this once, to stderr.

    sightline key new alice >> keys.txt
    """
    from serve.admission.auth import new_key

    with report_errors():
        key, line = new_key(name)
        print(line)
        err.print(f"the key of {name}, which is stored nowhere: {key}", highlight=False)


def _tag(job: JobConfig, retry: list[str] | None = None) -> int:
    """Run a job with progress and a summary. Returns the exit code."""
    from pipelines.job import run_job
    from sightline.metrics import RunMetrics

    with RunProgress(err) as progress:
        outcome = run_job(job, RunMetrics(progress), retry)
    plan, manifest = outcome.plan, outcome.manifest
    skipped = plan.skipped.counts + Counter(manifest.get("skipped_members", {}))
    if skipped:
        what = ", ".join(f"{count:,} {why}" for why, count in skipped.most_common())
        such = f"; such as {', '.join(plan.skipped.examples)}" if plan.skipped.examples else ""
        heif = (
            "; install sightline[heic] to read HEIC" if any(f".{s} files" in skipped for s in ("heic", "heif")) else ""
        )
        out.print(escape(f"skipped {skipped.total():,}: {what}{such}{heif}"), highlight=False)
    if outcome.new_shards:
        _print_summary(job, manifest)
    elif not outcome.waiting:
        if not plan.inputs and not plan.known:
            err.print(f"nothing is under {escape(', '.join(job.input))} now", highlight=False)
        what = "rejects of these reasons" if retry is not None else "shards"
        done = f"all {manifest['shards']} shards with {manifest['rows_in']:,} images are in {job.output}"
        out.print(escape(f"nothing to do: {done}" if retry is None else f"no {what} to retry: {done}"), highlight=False)
    if outcome.waiting:
        _print_waiting(outcome.waiting)
    if outcome.rejected_fraction > job.max_reject_fraction:
        total = manifest["rows_rejected"] / max(1, manifest["rows_in"])
        err.print(
            f"[red]{outcome.rejected_fraction:.1%} of this run's images were rejected, over max_reject_fraction "
            f"{job.max_reject_fraction:.1%}[/red] ({total:.1%} of the whole output): see {escape(job.output)}/rejects",
            highlight=False,
        )
    if outcome.waiting:
        return FAILED
    return TOO_MANY_REJECTS if outcome.rejected_fraction > job.max_reject_fraction else 0


def _print_waiting(waiting: list[Waiting]) -> None:
    """What could not be read now, by reason, each with an example."""
    images = sum(item.rows for item in waiting)
    err.print(
        f"[red]{len(waiting):,} shards or inputs with about {images:,} images wait[/red]: the rest is committed; run "
        "the same command again when they can be read",
        highlight=False,
    )
    for reason, count in Counter(item.reason for item in waiting).most_common():
        example = next(item for item in waiting if item.reason == reason)
        err.print(escape(f"  {reason} {count:,}: {example.detail}"), highlight=False)
    if any(item.reason == "missing" for item in waiting):
        err.print("  set on_missing: reject to give up what was deleted on purpose", highlight=False)


def _print_summary(job: JobConfig, manifest: dict[str, object]) -> None:
    run = manifest["run"]
    assert isinstance(run, dict)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row(
        "images",
        f"{run['rows']:,} in {run['seconds']:.1f} s, {run['rows_tagged']:,} tagged, {run['rows_rejected']:,} rejected",
    )
    table.add_row("images/s", f"{run['images_per_second']:,} (limited by {run['limited_by']})")
    for title, key in (("tags", "top_labels"), ("rejects", "reasons")):
        counts = manifest[key]
        assert isinstance(counts, dict)
        shown = [f"{escape(name)} {count:,}" for name, count in list(counts.items())[:8]]
        more = f", and {len(counts) - 8} more" if len(counts) > 8 else ""
        table.add_row(title, (", ".join(shown) or "none") + more)
    table.add_row("output", escape(job.output))
    out.print(table)
    reader = f"pyarrow.dataset.dataset({job.output.rstrip('/') + '/data'!r}).to_table().slice(0, 5).to_pandas()"
    if is_remote(job.output):
        reader = f"duckdb.sql(\"from '{job.output.rstrip('/')}/data/*.parquet' limit 5\")"
    out.print(f"read it: [bold]{escape(reader)}[/bold]", highlight=False)
