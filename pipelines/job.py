"""The job: images in, labels and embeddings out, source to sink."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from pipelines.cluster import (
    ACTOR_START_SECONDS,
    COMMIT_CPUS,
    READER_CPUS,
    RETRIES,
    Cluster,
    connect,
    data_context,
    iterate_rows,
)
from pipelines.config import JobConfig
from pipelines.inputs.columns import PassedColumns
from pipelines.inputs.listing import PlanReport, Waiting
from pipelines.inputs.plan import ShardRef, draft_plan, list_shards, publish_plan
from pipelines.inputs.rows import Reading
from pipelines.output.commit import Committer
from pipelines.output.fingerprint import (
    check_fingerprint,
    claim_output,
    make_fingerprint,
    read_columns,
    read_fingerprint,
)
from pipelines.output.labels import LabelTable, claim_labels, make_label_table, read_label_table
from pipelines.output.layout import OutputFormat, finish_output, list_commits, read_json
from pipelines.output.parts import PartWriter
from pipelines.output.retry import list_retries
from pipelines.run_report import Progress, RunReport
from pipelines.stages.reader import ReaderConfig, prepare_reader, read_shard
from pipelines.stages.sink import write_parts
from pipelines.stages.tagger import Tagger, TaggerConfig
from siglip.checkpoint import CheckpointError, PinnedModel, pin_model
from siglip.config import ModelConfig
from siglip.heads import check_probes
from siglip.labels import LabelError, LabelSet
from siglip.scoring import Floats, Scale
from storage.mirror import Mirror
from storage.schemes import open_store
from storage.settings import ConfigError
from storage.store import NotFound, Store, StoreError, StoreOptions, Unreachable, join

GPU_ROWS = 1024
"""Rows in one call of an actor on a GPU: several forward passes, so that copying one batch overlaps with another's."""
READERS_ENVIRONMENT = {"env_vars": {"SIGHTLINE_STAGE": "read"}}
"""Ray runs a task in any idle worker of the task's environment. In one of their own readers find a worker that has read
before, and there are no more of those, each with its decoders, than shards are read at once. Among all workers 300
shards had seven decoders of 240 MiB, of which two worked."""
COMPILE_FLOPS = {"cpu": 1e14, "cuda": 3e16}
"""Work that earns back the minute of torch.compile: about 2,300 base images on a CPU, 700,000 on a GPU."""


@dataclass
class Outcome:
    """How a run ended. `run` counts this run alone, `manifest` all that the output holds.

    `waiting` is what could not be read now: shards that are not committed, and inputs that are not planned.
    """

    plan: PlanReport
    manifest: dict[str, Any]
    new_shards: int
    rejected_fraction: float
    waiting: list[Waiting]


def run_job(config: JobConfig, progress: Progress, retry: Collection[str] | None = None) -> Outcome:
    """Do what is planned and not yet committed. With `retry`, also the rows rejected for these reasons (none: any).

    There is no resuming: every run compares the inputs with the plan, the plan with the commits, and does the rest.
    Killed at any moment, the next run loses and doubles nothing.

    Raises `ConfigError` before any work when something must be changed, `StoreError` or Ray's errors when the run
    could not finish.
    """
    account = RunReport()
    options = StoreOptions.from_environment(config.s3.endpoint, config.s3.region)
    with _as_config_errors():
        store = open_store(config.output, options)
        model = pin_model(config.model, Mirror(replace(options, endpoint=config.model.endpoint or options.endpoint)))
        config.labels.check(model.rule)
        check_probes(config.labels, model.identity, model.width)
        progress.say("listing the inputs")
        plan, writer, fingerprint = extend_plan(config, options, store, model)
        planned = list(list_shards(store, config.output))
        commits = list_commits(store, config.output)
        pending = [ref for ref in planned if ref.shard not in commits]
        if retry is not None:
            pending += list_retries(store, config.output, planned, commits, retry)
    waiting = list(plan.waiting)
    names = [ref.shard for ref in planned]
    if not pending:
        manifest = _current_manifest(store, config.output, fingerprint, names, commits, waiting)
        return Outcome(plan, manifest, 0, 0.0, waiting)
    reading = Reading(
        options, config.limits.max_bytes, config.parquet, writer.format.columns, config.on_changed, config.on_missing
    )
    progress.say("starting Ray")
    with connect(config, model.is_small) as cluster, data_context(cluster, 3 * model.spec.size**2):
        progress.say("loading the model")
        rows = sum(ref.rows for ref in pending)
        reader = ReaderConfig(
            config.output,
            reading,
            model.spec,
            config.limits,
            config.decode,
            config.thumbnails,
            frozenset(retry or ()),
            decoders=cluster.decoders,
            rows_per_decoder=max(1, rows // cluster.count_decoders()),
        )
        if cluster.readers and not cluster.reads_early:  # without that number, nobody knows how many there will be
            for _ in range(cluster.count_tasks(len(pending))):
                _prepare_reader.remote(reader)
        tagger = _prepare_tagger(config, store, model, cluster, rows)
        progress.start(len(pending), rows)
        committer = Committer(pending, writer, account, progress, cluster.count_readers)
        for receipt in iterate_rows(build_dataset(pending, config, cluster, reader, tagger, writer)):
            committer.receive(receipt)
        committer.finish()
        # Before Ray is stopped: that takes a second or two, in which no image is worked on.
        summary = account.summarize(cluster.count_readers(), cluster.count_decoders())
    waiting += committer.waiting
    if account.shards + len(committer.waiting) < len(pending):
        left = len(pending) - account.shards - len(committer.waiting)
        raise StoreError(f"{left} shards did not complete; run the same command again")
    listed = [asdict(item) for item in waiting[:100]]
    manifest = finish_output(store, config.output, fingerprint, names, summary, listed)
    return Outcome(plan, manifest, account.shards, account.rejected_fraction(), waiting)


def build_dataset(
    pending: list[ShardRef],
    config: JobConfig,
    cluster: Cluster,
    reader: ReaderConfig,
    tagger: TaggerConfig,
    writer: PartWriter,
) -> Dataset:
    """Source to sink. The rows that come out are receipts: see `pipelines.output.parts.RECEIPT_SCHEMA`."""
    actors = cluster.actors
    at_once = TaskPoolStrategy(size=cluster.count_tasks(len(pending)))
    arrow: dict[str, Any] = {"batch_format": "pyarrow", "zero_copy_batch": True}
    # A pool may have more actors than there are shards to start with: shards are many blocks.
    warnings.filterwarnings("ignore", ".*minimum number of concurrent actors.*", category=UserWarning)
    return (
        # One block for each shard, so that a task reads one shard.
        ray.data.from_items([asdict(ref) for ref in pending], override_num_blocks=len(pending))
        .map_batches(
            read_shard,
            fn_kwargs={"config": reader},
            batch_size=None,
            compute=at_once,
            num_cpus=READER_CPUS,
            max_retries=RETRIES,
            runtime_env=READERS_ENVIRONMENT,
            **arrow,
        )
        .map_batches(
            Tagger,
            fn_constructor_kwargs={"config": tagger},
            # Beside a GPU Ray Data asks for a number, and collects that many rows before it calls.
            batch_size=min(GPU_ROWS, config.rows_per_shard) if cluster.actor_gpus else None,
            compute=ActorPoolStrategy(
                min_size=actors.smallest,
                max_size=actors.largest,
                initial_size=actors.initial or actors.smallest,
                max_tasks_in_flight_per_actor=2,
            ),
            num_gpus=cluster.actor_gpus or None,
            num_cpus=cluster.actor_cpus,
            resources=actors.resources or None,
            max_restarts=RETRIES,
            # Bounded by the restarts. A node that is lost is noticed after half a minute, and every call on its actor
            # until then counts as a retry: five of them were over in seconds, and the run with them.
            max_task_retries=-1,
            **arrow,
        )
        .map_batches(
            write_parts,
            fn_kwargs={"writer": writer},
            batch_size=None,
            compute=at_once,
            num_cpus=COMMIT_CPUS,
            max_retries=RETRIES,
            **arrow,
        )
    )


@contextmanager
def _as_config_errors() -> Iterator[None]:
    """Before any work, what store or checkpoint refuse is the user's to change; a store that does not answer is not."""
    try:
        yield
    except Unreachable:
        raise
    except (StoreError, CheckpointError, LabelError) as error:
        raise ConfigError(str(error)) from error


def extend_plan(
    config: JobConfig, options: StoreOptions, store: Store, model: PinnedModel
) -> tuple[PlanReport, PartWriter, dict[str, Any]]:
    """Plan what is new, in an output that is this configuration's. Also the fingerprint, and how to write there."""
    wanted = config.parquet.columns
    while True:
        found = read_fingerprint(store, config.output)
        # The types of the first run stay; another set of columns is another output, and refused as such.
        fixed = read_columns(found) if found and set(read_columns(found).names) == set(wanted.values()) else None
        columns = PassedColumns(wanted, fixed)
        if found and fixed is not None:  # before a listing that may take long
            check_fingerprint(found, make_fingerprint(config, model, fixed), config.output)
        with tempfile.TemporaryDirectory(prefix="sightline-plan-") as folder:
            draft = draft_plan(config, options, columns, Path(folder))
            fingerprint = make_fingerprint(config, model, columns.schema())
            # An output in which nothing is planned yet is nobody's.
            text = claim_output(store, config.output, fingerprint) if found or draft.files else ""
            if publish_plan(draft, store, config.output):
                break
            # Another run appended meanwhile. Its plan may hold the same inputs, so the comparison starts again.
    format_ = OutputFormat(
        model.width,
        config.embedding_dtype,
        bool(config.thumbnails),
        columns.schema(),
        bands=config.labels.has_bands(),
    )
    return draft.report, PartWriter(config.output, options, format_, text), fingerprint


@ray.remote(num_cpus=READER_CPUS, max_retries=0, runtime_env=READERS_ENVIRONMENT)
def _prepare_reader(config: ReaderConfig) -> None:
    """While the labels are embedded and the model is loaded. Without it the first shard's task does the same."""
    import ray.data  # noqa: F401  # what a task of Ray Data imports first: 300 modules

    prepare_reader(config)


@ray.remote(max_retries=RETRIES)
def _embed_labels(model: PinnedModel, labels: LabelSet, threads: int, gpus: float) -> tuple[Floats, Scale]:
    import torch

    from siglip.encoder import Encoder

    torch.set_num_threads(threads)
    config = model.config.model_copy(update={"compile": False})
    encoder = Encoder(replace(model, config=config), gpus=gpus)
    encoder.warm_up()
    return encoder.embed_labels(labels), encoder.scale


@ray.remote(max_retries=RETRIES)
def _check_machine(model: ModelConfig, gpus: float) -> None:
    from siglip.encoder import check_machine

    check_machine(model, gpus)


def _prepare_tagger(config: JobConfig, store: Store, model: PinnedModel, cluster: Cluster, rows: int) -> TaggerConfig:
    """What the actors need. Only the first run over an output embeds the label set.

    On a worker, because the driver may be a small pod without torch's memory; and on one like an actor, so that a
    checkpoint or a machine that cannot be used is known before any image is read. A later run knows that checkpoint.
    """
    threads, gpus = max(1, int(cluster.actor_cpus)), cluster.actor_gpus
    table = _find_labels(store, config.output)
    may_lack = gpus or model.config.device == "cuda" or model.config.compile is True
    if table is None or may_lack:
        # The time limit is for finding room: embedding thousands of labels may take longer.
        _run_like_actor(_check_machine, config, cluster, model.config, gpus, seconds=ACTOR_START_SECONDS)
    if table is None:
        texts, scale = _run_like_actor(_embed_labels, config, cluster, model, config.labels, threads, gpus)
        with _as_config_errors():
            made = make_label_table(config.labels, texts, scale, model)
        table = claim_labels(store, config.output, made)
    if model.config.compile == "auto":
        worth_it = rows * model.vision_flops >= COMPILE_FLOPS["cuda" if gpus else "cpu"]
        resolved = model.config.model_copy(update={"compile": "auto" if worth_it else False})
        model = replace(model, config=resolved)
    return TaggerConfig(model, config.labels, table.head, threads, gpus)


def _find_labels(store: Store, output: str) -> LabelTable | None:
    with _as_config_errors():
        try:
            return read_label_table(store, output)
        except NotFound:
            return None


def _run_like_actor(
    task: Any, config: JobConfig, cluster: Cluster, *arguments: Any, seconds: float | None = None
) -> Any:
    """What a task makes of its arguments where an actor would find room, within so many seconds."""
    resources = config.actors.resources
    cpus, gpus = cluster.actor_cpus, cluster.actor_gpus
    result = task.options(num_cpus=cpus, num_gpus=gpus, resources=resources).remote(*arguments)
    try:
        return ray.get(result, timeout=seconds)
    except ray.exceptions.GetTimeoutError as error:
        ray.cancel(result)
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in {"CPUs": cpus, "GPUs": gpus, **resources}.items())
        raise ConfigError(
            f"actors: no node had room for one of {wanted} within {seconds:g} seconds: ask for less, or add such a node"
        ) from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, CheckpointError):
            raise ConfigError(str(error.cause)) from error
        raise


def _current_manifest(
    store: Store,
    output: str,
    fingerprint: dict[str, Any],
    names: list[str],
    commits: dict[str, int],
    waiting: list[Waiting],
) -> dict[str, Any]:
    """The manifest of a finished output; written now if a run was killed after its last commit."""
    try:
        manifest = read_json(store, join(output, "manifest.json"))
        whole = (manifest.get("shards"), manifest.get("generations", 0)) == (len(names), sum(commits.values()))
        if whole and not waiting and not manifest.get("waiting"):
            return manifest
        run = manifest.get("run", {})
    except NotFound:
        run = {}
    return finish_output(store, output, fingerprint, names, run, [asdict(item) for item in waiting[:100]])
