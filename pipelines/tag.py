"""The job: images in, labels and embeddings out, source to sink."""

from __future__ import annotations

import base64
import logging
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy

from pipelines.cluster import COMMIT_CPUS, Cluster, connect
from pipelines.commit import (
    SCHEMA_VERSION,
    Ledger,
    claim_output,
    finish_output,
    list_committed,
    read_json,
)
from pipelines.config import JobConfig
from pipelines.plan import PlanReport, ShardRef, extend_plan, list_shards, passed_schema
from pipelines.shards import OutputFormat, PartWriter
from pipelines.sources import Reading
from pipelines.stages import BLOCK_BYTES, Decoding, Tag, Tagging, read_shard, write_parts
from siglip.checkpoint import CheckpointError, embedding_width, identify_checkpoint, read_image_spec, vision_flops
from siglip.config import ModelConfig
from siglip.labels import LabelSet
from siglip.scoring import Floats, Scale
from storage.settings import ConfigError
from storage.store import NotFound, Store, StoreError, StoreOptions, join, open_store

RETRIES = 5
"""How often Ray may replay a task or restart an actor whose process died. Its default is for ever."""
GPU_ROWS = 1024
"""Rows in one call of an actor on a GPU: several forward passes, so that copying one batch overlaps with another's."""
ACTOR_START_SECONDS = 3600
"""How long to wait for the first actors: an autoscaler may have to bring a node up and pull an image."""
COMPILE_FLOPS = {"cpu": 1e14, "cuda": 3e16}
"""Work that earns back the minute of torch.compile: about 2,300 base images on a CPU, 700,000 on a GPU."""
STAGES = ("read", "decode", "queue", "model", "write")


class Progress(Protocol):
    """What a run tells while it runs."""

    def start(self, shards: int, rows: int) -> None:
        """Work begins: this many shards, and about this many images."""

    def say(self, message: str) -> None:
        """A step that takes a while."""

    def update(self, *, rows: int = 0, rejects: int = 0, shards: int = 0) -> None:
        """So much more is done: rows written, of them rejected, shards committed."""


@dataclass
class Outcome:
    """How a run ended. `run` counts this run alone, `manifest` all that the output holds."""

    plan: PlanReport
    manifest: dict[str, Any]
    new_shards: int
    rejected_fraction: float


@dataclass
class _Run:
    """What one run measured."""

    started: float = field(default_factory=time.time)
    working: float = float("inf")
    rows: int = 0
    tagged: int = 0
    rejected: int = 0
    shards: int = 0
    seconds: Counter[str] = field(default_factory=Counter)
    actors: set[str] = field(default_factory=set)

    def add(self, receipt: dict[str, Any]) -> None:
        self.tagged += receipt["tagged"]
        self.rejected += receipt["rejected"]
        self.rows += receipt["tagged"] + receipt["rejected"]
        self.actors.update(receipt["actors"])
        self.working = min(self.working, receipt["started_at"] or self.working)
        for stage in STAGES:
            self.seconds[stage] += receipt[f"{stage}_s"]

    def summarize(self, readers: int) -> dict[str, Any]:
        """For the manifest. What limited the run is the stage whose workers were busiest; waiting is no work."""
        wall = max(time.time() - self.working, 1e-9)
        workers = {"read": readers, "decode": readers, "model": max(1, len(self.actors)), "write": 1}
        busy = {stage: self.seconds[stage] / (wall * count) for stage, count in workers.items()}
        return {
            "shards": self.shards,
            "rows": self.rows,
            "rows_tagged": self.tagged,
            "rows_rejected": self.rejected,
            "startup_seconds": round(self.working - self.started, 3),
            "seconds": round(wall, 3),
            "stage_seconds": {stage: round(self.seconds[stage], 3) for stage in STAGES},
            "busy": {stage: round(share, 3) for stage, share in busy.items()},
            "limited_by": max(busy, key=lambda stage: busy[stage]),
            "images_per_second": round(self.rows / wall, 2),
            "actors": sorted(self.actors),
        }


def run_job(config: JobConfig, progress: Progress) -> Outcome:
    """Do what is planned and not yet committed.

    There is no resuming: every run compares the inputs with the plan, the plan with the commits, and does the rest.
    Killed at any moment, the next run loses and doubles nothing.

    Raises `ConfigError` before any work when something must be changed, `StoreError` or Ray's errors when the run
    could not finish.
    """
    run = _Run()
    options = StoreOptions.from_environment(config.s3.endpoint, config.s3.region)
    try:
        store = open_store(config.output, options)
        fingerprint, columns = _prepare_output(config, store, options)
        writer = PartWriter(
            config.output,
            options,
            OutputFormat(embedding_width(config.model), config.embedding_dtype, bool(config.thumbnails), columns),
            claim_output(store, config.output, fingerprint),
        )
        progress.say("listing the inputs")
        plan = extend_plan(config, options)
        decoding = Decoding(
            Reading(options, config.limits.max_bytes, config.parquet, config.on_changed),
            read_image_spec(config.model),
            config.limits,
            config.decode,
            config.thumbnails,
            columns,
        )
        planned = list(list_shards(store, config.output))
        committed = list_committed(store, config.output)
    except (StoreError, CheckpointError) as error:
        raise ConfigError(str(error)) from error
    pending = [ref for ref in planned if ref.shard not in committed]
    names = [ref.shard for ref in planned]
    if not pending:
        return Outcome(plan, _current_manifest(store, config.output, fingerprint, names), 0, 0.0)
    progress.say("starting Ray")
    with connect(config) as cluster, _data_context():
        progress.say("loading the model")
        rows = sum(ref.rows for ref in pending)
        tagging = _prepare_labels(config, rows, on_gpus=cluster.actor_gpus > 0)
        progress.start(len(pending), rows)
        committer = _Committer({ref.shard for ref in pending}, writer, run, progress)
        for receipt in build_dataset(pending, config, cluster, decoding, tagging, writer).iter_rows():
            committer.receive(receipt)
        committer.finish()
        readers = cluster.count_readers()
    if run.shards < len(pending):
        raise StoreError(f"{len(pending) - run.shards} shards did not complete; run the same command again")
    manifest = finish_output(store, config.output, fingerprint, names, run.summarize(readers))
    return Outcome(plan, manifest, run.shards, run.rejected / max(1, run.rows))


def build_dataset(
    pending: list[ShardRef],
    config: JobConfig,
    cluster: Cluster,
    decoding: Decoding,
    tagging: Tagging,
    writer: PartWriter,
) -> Dataset:
    """Source to sink. The rows that come out are receipts: see `pipelines.stages.RECEIPT_SCHEMA`."""
    actors = cluster.actors
    arrow: dict[str, Any] = {"batch_format": "pyarrow", "zero_copy_batch": True}
    warnings.filterwarnings("ignore", ".*ray_remote_args.*", category=DeprecationWarning)  # retries have no other way
    return (
        # One block for each shard, so that a task reads one shard.
        ray.data.from_items([asdict(ref) for ref in pending], override_num_blocks=len(pending))
        .map_batches(
            read_shard,
            fn_kwargs={"decoding": decoding},
            batch_size=None,
            compute=TaskPoolStrategy(size=min(cluster.readers or len(pending), len(pending))),
            num_cpus=1,
            max_retries=RETRIES,
            **arrow,
        )
        .map_batches(
            Tag,
            fn_constructor_kwargs={"tagging": tagging, "threads": max(1, int(cluster.actor_cpus))},
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
            num_cpus=COMMIT_CPUS,
            max_retries=RETRIES,
            **arrow,
        )
    )


class _Committer:
    """Turns receipts into commits while the dataset runs. The commits themselves are tasks of the cluster."""

    def __init__(self, pending: set[str], writer: PartWriter, run: _Run, progress: Progress) -> None:
        self.ledger = Ledger(pending)
        self._writer = ray.put(writer)
        self._run = run
        self._progress = progress
        self._in_flight: list[ray.ObjectRef[dict[str, Any]]] = []

    def receive(self, receipt: dict[str, Any]) -> None:
        """Note a receipt, commit its shard if that completes it, and look after commits that have finished."""
        self._run.add(receipt)
        self._progress.update(rows=receipt["tagged"] + receipt["rejected"], rejects=receipt["rejected"])
        if self.ledger.add(receipt):
            parts, rows_in = self.ledger.take(receipt["shard"])
            self._in_flight.append(_commit.remote(self._writer, receipt["shard"], parts, rows_in))
        if self._in_flight:
            done, self._in_flight = ray.wait(self._in_flight, num_returns=len(self._in_flight), timeout=0)
            self._note(done)

    def finish(self) -> None:
        """Wait for the commits that are still under way."""
        while self._in_flight:
            done, self._in_flight = ray.wait(self._in_flight)
            self._note(done)

    def _note(self, done: list[ray.ObjectRef[dict[str, Any]]]) -> None:
        for _ in ray.get(done):
            self._run.shards += 1
            self._progress.update(shards=1)


@ray.remote(num_cpus=COMMIT_CPUS, max_retries=RETRIES)
def _commit(writer: PartWriter, shard: str, parts: list[str], rows_in: int) -> dict[str, Any]:
    return {"shard": writer.commit(shard, parts, rows_in)["shard"]}


@ray.remote(num_cpus=1, max_retries=RETRIES)
def _embed_labels(model: ModelConfig, labels: LabelSet) -> tuple[Floats, Scale]:
    from siglip.encoder import Encoder

    encoder = Encoder(model.model_copy(update={"compile": False}))
    return encoder.embed_labels(labels), encoder.scale


def _prepare_labels(config: JobConfig, rows: int, *, on_gpus: bool) -> Tagging:
    """Embed the label set once, on a worker: the driver may be a small pod without torch's memory."""
    try:
        texts, scale = ray.get(
            _embed_labels.options(resources=config.actors.resources).remote(config.model, config.labels)
        )
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, CheckpointError):
            raise ConfigError(str(error.cause)) from error
        raise
    model = config.model
    if model.compile == "auto":
        work = rows * vision_flops(model)
        worth_it = work >= COMPILE_FLOPS["cuda" if on_gpus else "cpu"]
        model = model.model_copy(update={"compile": "auto" if worth_it else False})
    return Tagging(model, config.labels, texts, scale)


@contextmanager
def _data_context() -> Iterator[None]:
    """Ray Data's settings for this run; put back afterwards, because they belong to the whole process."""
    context = DataContext.get_current()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ours = {
        "target_max_block_size": BLOCK_BYTES,
        "enable_progress_bars": False,
        "max_errored_blocks": 0,  # more would drop whole blocks without a word
        "wait_for_min_actors_s": ACTOR_START_SECONDS,
        "max_consecutive_actor_init_deaths": 3,
    }
    before = {name: getattr(context, name) for name in ours}
    for name, value in ours.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _prepare_output(config: JobConfig, store: Store, options: StoreOptions) -> tuple[dict[str, Any], pa.Schema]:
    """The run's fingerprint, and the types of passed-through columns: those of the first run stay."""
    try:
        found = read_json(store, join(config.output, "fingerprint.json"))
    except NotFound:
        found = {}
    if found and found["parquet.columns"].keys() == set(config.parquet.columns):
        columns = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(found["parquet.schema"])))
    else:
        columns = passed_schema(config, options)
    spec = read_image_spec(config.model)
    labels = config.labels
    return {
        "schema_version": SCHEMA_VERSION,
        "model.weights": identify_checkpoint(config.model),
        "model.image_size": spec.size,
        "model.resample": spec.resample,
        "model.mean": list(spec.mean),
        "model.std": list(spec.std),
        "decode": config.decode,
        "labels.digest": labels.digest()[:16],
        "labels.names": labels.label_names(),
        "labels.templates": list(labels.templates),
        "labels.thresholds": labels.thresholds(),
        "labels.top_k": labels.top_k,
        "embedding_dtype": config.embedding_dtype,
        "thumbnails": config.thumbnails,
        "parquet.columns": {field.name: str(field.type) for field in columns},
        "parquet.schema": base64.b64encode(columns.serialize()).decode(),
    }, columns


def _current_manifest(store: Store, output: str, fingerprint: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The manifest of a finished output; written now if a run was killed after its last commit."""
    try:
        manifest = read_json(store, join(output, "manifest.json"))
        if manifest.get("shards") == len(names):
            return manifest
    except NotFound:
        pass
    return finish_output(store, output, fingerprint, names, {})
