"""The batch job: images in, labels and embeddings out. `build_dataset` is the pipeline from source to sink."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain
from typing import Any

import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from pipelines.cluster import (
    BLOCKS_PER_READER,
    COMMIT_CPUS,
    READER_CPUS,
    RETRIES,
    WAVE_BLOCKS,
    data_context,
    iterate_rows,
)
from pipelines.committer import Committer
from pipelines.config import JobConfig
from pipelines.limit import NO_LIMIT, Limit
from pipelines.output.writer import OutputWriter
from pipelines.planning.listing import PlanReport, Waiting
from pipelines.planning.plan import ShardRef
from pipelines.preparation import Work, find_work, prepare_readers, prepare_tagger
from pipelines.progress import Progress
from pipelines.ray_internals import READER_ENVIRONMENT, keep_actors
from pipelines.run_report import RunReport
from pipelines.sizing import Cluster
from pipelines.stages.first_images import check_first_images
from pipelines.stages.reader import ReaderConfig, read_shard
from pipelines.stages.sink import write_parts
from pipelines.stages.tagger import Tagger, TaggerConfig
from pipelines.startup import Startup
from storage.store import StoreError

GPU_ROWS = 1024
"""The most rows in one call of an actor on a GPU. That is several forward passes, so that the copy of one batch to the
GPU overlaps with the forward pass of another."""
_WAITING_LISTED = 100


@dataclass
class Outcome:
    """The result of a run. `new_shards` and `rejected_fraction` are of this run, `manifest` is of the whole output.

    `waiting` are shards that were not committed and inputs that were not planned, because they could not be read now.
    `left` is the number of planned shards that a run with a `Limit` left to later runs. `published` tells what became
    of the output's tables, and `unpublished` why they were not brought up to it, empty if they were. `trouble` counts
    the images of this run whose hosts were in trouble, by the host and what it did: a later run tries them again.
    """

    plan: PlanReport
    manifest: dict[str, Any]
    new_shards: int
    rejected_fraction: float
    waiting: list[Waiting]
    left: int = 0
    published: list[str] = field(default_factory=list)
    unpublished: str = ""
    trouble: Counter[str] = field(default_factory=Counter)

    @property
    def host_trouble(self) -> int:
        """How many images of the whole output wait for a later run, because their hosts were in trouble."""
        return int(self.manifest.get("reasons", {}).get("host_trouble", 0))


def run_job(
    config: JobConfig, progress: Progress, retry: Collection[str] | None = None, limit: Limit = NO_LIMIT
) -> Outcome:
    """Tag all images that are not yet committed. With `retry`, also retry rows rejected for these reasons (none: any).

    With a `limit`, do a part of the work. If `fetch.enabled` is true, images whose hosts were in trouble are retried.

    Every run compares the inputs with the plan and the plan with the commits, and does what is missing. So a run that
    is killed at any moment loses and duplicates nothing: start it again.

    Raises `ConfigError` before any work if the user must change something, and `StoreError` or an exception of Ray if
    the run could not finish.
    """
    if config.fetch.enabled and (retry is None or retry):
        retry = {*(retry or ()), "host_trouble"}
    report = RunReport()
    with ExitStack() as stack:
        return _run(config, progress, Startup(config, progress, stack), report, retry, limit)


def _run(
    config: JobConfig,
    progress: Progress,
    startup: Startup,
    report: RunReport,
    retry: Collection[str] | None,
    limit: Limit,
) -> Outcome:
    work = find_work(config, progress, startup, retry, limit)
    waiting = list(work.plan.waiting)
    if not work.shards:
        manifest = _current_manifest(work, waiting)
        told = work.publication.lines, work.publication.failure
        return Outcome(work.plan, manifest, 0, 0.0, waiting, 0, *told)
    work.state.announce(work.segments())
    for other in work.state.find_others():
        progress.say(
            f"another {other.kind} works on this output since {other.started_at:%Y-%m-%d %H:%M:%S} UTC, or was killed "
            "on another machine: nothing is lost or doubled, but both do the same work"
        )
    try:
        done = _process(work, config, progress, startup, report, retry)
    except StoreError:  # the marker cannot be written either
        raise
    except BaseException:
        work.state.leave(_describe_time(report, config) | report.count() | {"stopped": True})
        raise
    about = _describe_time(report, config) | {"stopped": done.left > 0}
    manifest = _finish(work, done.summary | about, done.waiting)
    fraction = report.rejected_fraction()
    told = work.publication.lines, work.publication.failure
    return Outcome(work.plan, manifest, report.shards, fraction, done.waiting, done.left, *told, report.trouble)


@dataclass
class _Processed:
    """What became of a run's shards: its `summary` for the manifest, all that waits, and how many shards are `left`."""

    summary: dict[str, Any]
    waiting: list[Waiting]
    left: int


def _process(
    work: Work,
    config: JobConfig,
    progress: Progress,
    startup: Startup,
    report: RunReport,
    retry: Collection[str] | None,
) -> _Processed:
    """Process the shards of a run on Ray, and commit them."""
    cluster = startup.connect(work.model)
    with data_context(cluster, work.model.spec.bytes), keep_actors():
        reader = prepare_readers(config, work, cluster, report.started, retry)
        tagger = prepare_tagger(config, work, cluster, startup)
        fidelity = check_first_images(work, cluster, reader, tagger, progress)
        batch_rows = min(GPU_ROWS, config.rows_per_shard) if cluster.actor_gpus else None
        progress.start(work.shards, work.rows)
        committer = Committer(work.state, work.writer, report, progress, cluster.count_readers)
        away = late = False
        waves = work.waves(BLOCKS_PER_READER * cluster.count_readers())
        for wave in chain(waves, committer.list_missing(WAVE_BLOCKS)):
            late = reader.deadline is not None and time.time() >= reader.deadline
            if late:
                break
            refs = [ref for group in wave for ref in group]
            committer.expect(refs)
            rows = sum(ref.rows for ref in refs)
            reader = replace(reader, rows_per_decoder=max(1, rows // cluster.count_decoders()))
            receipts = iterate_rows(build_dataset(wave, cluster, reader, tagger, work.writer, batch_rows))
            with closing(receipts):
                away = any(committer.receive(receipt) for receipt in receipts)
            if away:
                break
        if not away and not late:
            committer.set_missing_aside()
        committer.finish()
        # Summed up before Ray is stopped, which takes a second or two in which no image is processed.
        tasks = cluster.count_tasks(min(work.shards, WAVE_BLOCKS))
        summary = report.summarize(min(cluster.count_readers(), tasks), cluster.count_decoders(), tasks)
        if config.model.dtype == "int8":  # null says that there was nothing to compare
            summary["fidelity"] = fidelity and asdict(fidelity)
    # Without a deadline, shards that were not expected are another run's, which has committed them meanwhile.
    left = committer.stopped + work.beyond
    if late:
        left += work.shards - committer.expected + committer.count_missing()
    if away:
        committer.give_up(work.shards - report.shards - len(committer.waiting), max(0, work.rows - report.rows))
        left = work.beyond
    return _Processed(summary, committer.list_waiting(work.plan.waiting), left)


def build_dataset(
    pending: list[list[ShardRef]],
    cluster: Cluster,
    reader: ReaderConfig,
    tagger: TaggerConfig,
    writer: OutputWriter,
    batch_rows: int | None,
) -> Dataset:
    """Build the pipeline from source to sink: shards, decoded images, labels and embeddings, part files.

    Each list of `pending` is an input block, whose shards one task reads. The dataset's rows are receipts, with the
    columns `pipelines.stages.sink.RECEIPT_SCHEMA`. An actor is called with blocks as readers make them, or with exactly
    `batch_rows` rows at a time if that is not None.
    """
    actors = cluster.actors
    tasks = TaskPoolStrategy(size=cluster.count_tasks(len(pending)))
    pool = ActorPoolStrategy(
        min_size=actors.smallest,
        max_size=actors.largest,
        initial_size=actors.initial or actors.smallest,
        max_tasks_in_flight_per_actor=2,
    )
    arrow: dict[str, Any] = {"batch_format": "pyarrow", "zero_copy_batch": True}
    return (
        ray.data.from_items(
            [{"refs": [asdict(ref) for ref in group]} for group in pending], override_num_blocks=len(pending)
        )
        .map_batches(
            read_shard,
            fn_kwargs={"config": reader},
            batch_size=None,
            compute=tasks,
            num_cpus=READER_CPUS,
            max_retries=RETRIES,
            runtime_env=READER_ENVIRONMENT,
            **arrow,
        )
        .map_batches(
            Tagger,
            fn_constructor_kwargs={"config": tagger},
            # With GPUs, Ray Data requires a number, and collects that many rows before it calls the actor.
            batch_size=batch_rows,
            compute=pool,
            num_gpus=cluster.actor_gpus or None,
            num_cpus=cluster.actor_cpus,
            resources=actors.resources or None,
            max_restarts=RETRIES,
            # Unlimited, because restarts are limited. Ray notices a lost node after half a minute, and until then every
            # call of its actor counts as a retry: five retries were used up in seconds, and the run failed.
            max_task_retries=-1,
            **arrow,
        )
        .map_batches(
            write_parts,
            fn_kwargs={"writer": writer},
            batch_size=None,
            compute=tasks,
            num_cpus=COMMIT_CPUS,
            max_retries=RETRIES,
            **arrow,
        )
    )


def _describe_time(report: RunReport, config: JobConfig) -> dict[str, Any]:
    """Return when a run began, how long it took until now, and what that cost."""
    hours = report.elapsed() / 3600
    cost = None if config.cost.per_hour is None else round(hours * config.cost.per_hour, 4)
    return {"started_at": _format_time(report.started), "hours": round(hours, 4), "cost": cost}


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _finish(work: Work, run: dict[str, Any], waiting: list[Waiting]) -> dict[str, Any]:
    listed = [asdict(item) for item in waiting[:_WAITING_LISTED]]
    return work.state.finish(work.fingerprint, run, listed)


def _current_manifest(work: Work, waiting: list[Waiting]) -> dict[str, Any]:
    """Return the manifest of an output with nothing to do.

    Write it first, and bring the tables up to the output, if that is not done: after a run that was killed, or with a
    table that is new in the configuration.
    """
    manifest = work.state.read_manifest()
    if not manifest:
        return _finish(work, {}, waiting)
    told = not waiting and not manifest.get("waiting")
    if told and work.state.is_current(manifest) and work.publication.is_current(work.state):
        return manifest
    return _finish(work, manifest.get("run", {}), waiting)
