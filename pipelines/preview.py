"""Preview of a run: what it would do, about how long it would take, and what that would cost. Writes nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from pipelines.config import JobConfig
from pipelines.output.ledger import Ledger
from pipelines.output.output import Output
from pipelines.output.state import OutputState
from pipelines.planning.listing import Waiting
from pipelines.planning.plan import append_inputs, read_plan
from pipelines.preparation import as_config_errors, check_labels, check_settings, find_model
from pipelines.progress import Progress
from storage.store import StoreOptions

_RUNS = 10
"""Runs from which the speed is estimated."""


@dataclass(frozen=True)
class Preview:
    """What a run would do.

    `new_inputs` would be planned, as `new_shards` with about `new_images`. `shards` and `images` are all that are to be
    processed, with those of earlier runs that are not committed. `hours` and `cost` are estimated from the latest runs
    of this output, from their images/s and from the time that they took besides; `limited_by` is what limited the last
    one. They are None if there was none, or if `cost.per_hour` is not set.
    `skipped` counts what is no input by reason, as the summary of a run does, with a few names of each.
    """

    new_inputs: int
    new_shards: int
    new_images: int
    known_inputs: int
    shards: int
    images: int
    images_per_second: float | None
    hours: float | None
    cost: float | None
    limited_by: str | None
    waiting: list[Waiting] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_examples: dict[str, list[str]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the preview as a dictionary that JSON can hold."""
        return asdict(self)


def preview_run(config: JobConfig, progress: Progress) -> Preview:
    """List the inputs, and compare them with the plan and the plan with the ledgers. The model is not loaded.

    Raises `ConfigError` for what the user must change before a run, `Unreachable` if the store does not answer.
    """
    options = StoreOptions.from_environment(config.s3.endpoint, config.s3.region)
    with as_config_errors():
        output = Output(config.output, options)
        model = find_model(config, options)
        check_labels(config.labels, output, model, progress)
        columns = check_settings(config, output, model)
        progress.say("listing the inputs")
        plan = read_plan(output, config.list_roots())
        state = OutputState(output, plan, Ledger.read(output))
        unsealed = state.find_unsealed()
        shards, images = state.count_pending()
        done = [shard for shard in unsealed if state.ledger.generation_of(shard) < 0]
        rows = {ref.shard: ref.rows for ref in state.list_pending()} if done else {}
        report = append_inputs(config, output, plan, columns, None)
        assert report is not None
        runs = state.read_manifest().get("runs", [])
    shards += report.shards - len(done)
    images += report.rows - sum(rows[shard] for shard in done)
    rate, besides = _estimate_speed(runs)
    hours = None if rate is None else round((images / rate + (besides if images else 0)) / 3600, 4)
    per_hour = config.cost.per_hour
    return Preview(
        report.inputs,
        report.shards,
        report.rows,
        report.known,
        shards,
        images,
        rate,
        hours,
        None if hours is None or per_hour is None else round(hours * per_hour, 2),
        runs[0].get("limited_by") if runs else None,
        report.waiting,
        dict(report.skipped.counts),
        report.skipped.examples,
    )


def _estimate_speed(runs: list[dict[str, Any]]) -> tuple[float | None, float]:
    """Return the images/s of the latest runs together, and the seconds that one takes besides: Ray's start, the model.

    All images count the same: a night with two images says little about a backfill.
    """
    measured = [run for run in runs[:_RUNS] if run.get("images_per_second") and run.get("rows")]
    if not measured:
        return None, 0.0
    working = [run["rows"] / run["images_per_second"] for run in measured]
    besides = [max(0.0, 3600 * run.get("hours", 0) - seconds) for run, seconds in zip(measured, working, strict=True)]
    return sum(run["rows"] for run in measured) / sum(working), median(besides)
