"""What a run does before the first image: plan the inputs, embed the labels, start the decoders."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import ray

from pipelines.cluster import READER_CPUS, TOGETHER_ROWS, WAVE_BLOCKS
from pipelines.config import JobConfig
from pipelines.inputs.columns import PassedColumns
from pipelines.inputs.rows import Reading
from pipelines.limit import NO_LIMIT, Limit
from pipelines.output.fingerprint import (
    check_fingerprint,
    check_folder,
    claim_output,
    make_fingerprint,
    read_columns,
    read_fingerprint,
)
from pipelines.output.labels import LabelTable, claim_labels, read_label_table
from pipelines.output.output import Output
from pipelines.output.schema import OutputFormat
from pipelines.output.state import OutputState, read_state
from pipelines.output.writer import OutputWriter
from pipelines.planning.listing import PlanReport
from pipelines.planning.plan import Plan, ShardRef, append_inputs, group_shards, read_plan
from pipelines.progress import Progress
from pipelines.ray_internals import READER_ENVIRONMENT
from pipelines.sizing import Cluster
from pipelines.stages.reader import ReaderConfig, prepare_reader
from pipelines.stages.tagger import TaggerConfig
from pipelines.startup import Startup
from pipelines.tables.publication import Publication, check_table
from pipelines.upkeep.retry import list_retries
from siglip.checkpoint import PinnedModel, pin_model
from siglip.checkpoints.files import CheckpointError
from siglip.families.tokenizer import load_tokenizer
from siglip.heads import check_model
from siglip.labels import LabelError, LabelSet
from storage.mirror import Mirror
from storage.settings import ConfigError
from storage.store import NoSpace, NotFound, StoreError, StoreOptions, Unreachable

COMPILE_FLOPS = {"cpu": 1e14, "cuda": 3e16}
"""Amounts of work for which `compile: auto` compiles the model: about 2,300 images of the base model on a CPU, 700,000
on a GPU. With less work, the minute that torch.compile takes is not earned back."""


@dataclass(frozen=True)
class Work:
    """What a run has to do, and what it does it with.

    `shards` is the number of shards to process in this run, `rows` the expected number of their images, and `retries`
    those of them that are committed and have rejected rows to retry. `beyond` shards are beyond the run's limit.
    `publication` is of the output's tables.
    """

    model: PinnedModel
    writer: OutputWriter
    fingerprint: dict[str, Any]
    plan: PlanReport
    state: OutputState
    shards: int
    rows: int
    retries: list[ShardRef] = field(default_factory=list)
    limit: Limit = NO_LIMIT
    beyond: int = 0
    publication: Publication = field(default_factory=Publication)

    def waves(self, blocks: int) -> Iterator[list[list[ShardRef]]]:
        """Yield the shards to process: up to `WAVE_BLOCKS` lists of shards at a time, each for one input block.

        Small shards share a block, if there are at least `blocks` blocks then.
        """
        pending = islice(_list_pending(self.state, self.retries, self.limit), self.shards)
        groups = group_shards(pending, min(TOGETHER_ROWS, self.rows // blocks))
        while wave := list(islice(groups, WAVE_BLOCKS)):
            with_files = iter(self.state.ledger.with_files([ref for group in wave for ref in group]))
            yield [list(islice(with_files, len(group))) for group in wave]

    def segments(self) -> set[int]:
        """The numbers of the plan files that have shards to process."""
        pending = {int(ref.shard[:6]) for ref in self.retries}
        for segment in self.state.plan.segments:
            if (self.state.ledger.generations(segment.number, len(segment)) < 0).any():
                pending.add(segment.number)
        return pending


def _list_pending(state: OutputState, retries: Iterable[ShardRef], limit: Limit) -> Iterator[ShardRef]:
    return chain(state.list_pending(newest_first=limit.newest_first), retries)


def _apply(limit: Limit, pending: Iterable[ShardRef]) -> tuple[int, int]:
    """Return how many shards are within a limit, and their expected images."""
    shards = images = 0
    for ref in pending:
        if limit.images is not None and images >= limit.images:
            break
        shards, images = shards + 1, images + ref.rows
    return shards, images


def find_work(
    config: JobConfig,
    progress: Progress,
    startup: Startup,
    retry: Collection[str] | None = None,
    limit: Limit = NO_LIMIT,
) -> Work:
    """Load the model's configuration, plan new inputs, and compare the plan with the commits.

    Before a new output is claimed, `startup` makes sure that the run can do its work. With `retry`, committed shards
    with rows rejected for one of these reasons (any reason, if empty) are pending too.

    Raises `ConfigError` for everything that the user must change, `Unreachable` if the store does not answer.
    """
    options = StoreOptions.from_environment(config.s3.endpoint, config.s3.region)
    check_table(config.table, config.output)
    publication = Publication(config.table)
    with as_config_errors():
        output = Output(config.output, options)
        model = find_model(config, options)
        check_labels(config.labels, output, model, progress)
        output = replace(output, patient=True)  # its store has answered: the address is right
        progress.say("listing the inputs")
        planned, plan, writer, fingerprint = extend_plan(config, output, model, startup)
        for line in [*(f"images are in {line}" for line in plan.columns.describe()), *plan.notes]:
            progress.say(line)
        state = read_state(output, planned, publication)
        shards, rows = state.count_pending()
        retries = [] if retry is None else list(list_retries(state.ledger, planned, retry))
    shards, rows = shards + len(retries), rows + sum(ref.rows for ref in retries)
    within = shards, rows
    if limit.images is not None:
        within = _apply(limit, _list_pending(state, retries, limit))
    return Work(model, writer, fingerprint, plan, state, *within, retries, limit, shards - within[0], publication)


def find_model(config: JobConfig, options: StoreOptions) -> PinnedModel:
    """Pin the configuration's model. Raises `CheckpointError` and `StoreError`."""
    return pin_model(config.model, Mirror(replace(options, endpoint=config.model.endpoint or options.endpoint)))


def check_labels(labels: LabelSet, output: Output, model: PinnedModel, progress: Progress) -> None:
    """Check that the labels fit the model and that its tokenizer can read them. Tell of those that it reads in part.

    The driver does this before it claims the output: the labels of a claimed output cannot be changed. It loads the
    tokenizer only, and not torch. Raises `LabelError` and `CheckpointError`.
    """
    labels.check(model.rule)
    check_model(labels, model.identity, model.width)
    if _find_labels(output) is not None:  # the first run has embedded the labels
        return
    readings = load_tokenizer(model).read_labels(labels)[1]
    readings.check()
    if line := readings.describe_partly_read():
        progress.say(f"warning: {line}")


def extend_plan(
    config: JobConfig, output: Output, model: PinnedModel, startup: Startup | None = None
) -> tuple[Plan, PlanReport, OutputWriter, dict[str, Any]]:
    """Plan the new inputs, in an output with the fingerprint of this configuration.

    Also returns the output's whole plan, its writer and the fingerprint. `startup` is made ready before a new output is
    claimed, when there is an input. Raises `ConfigError` if the output was made
    with other settings.
    """
    while True:
        columns = check_settings(config, output, model)
        plan = read_plan(output, config.list_roots())

        def claim(columns: PassedColumns = columns) -> str:
            if startup is not None and columns.fixed is None:
                startup.prepare(model)
            return claim_output(output, make_fingerprint(config, model, columns.schema()))

        report = append_inputs(config, output, plan, columns, claim)
        if report is not None:
            break
        # Another run has appended to the plan meanwhile, perhaps the same inputs: compare again.
    fingerprint = make_fingerprint(config, model, columns.schema())
    # An output without planned inputs is not claimed: another configuration may still use it.
    text = claim() if columns.fixed is not None or plan.segments else ""
    format_ = OutputFormat(
        model.width,
        config.embedding_dtype,
        bool(config.thumbnails),
        columns.schema(),
        bands=config.labels.has_bands(),
    )
    return plan, report, OutputWriter(output, format_, text), fingerprint


def check_settings(config: JobConfig, output: Output, model: PinnedModel) -> PassedColumns:
    """Check that the output was made with the settings of this configuration, if there is one.

    Return the passed-through columns, with the types that the first run has fixed. This is checked before the listing,
    which may take long. Raises `ConfigError`.
    """
    check_folder(output)
    found, wanted = read_fingerprint(output), config.parquet.columns
    # Another set of columns is refused as a different fingerprint.
    fixed = read_columns(found) if found and set(read_columns(found).names) == set(wanted.values()) else None
    if found and fixed is None:  # before the new columns are looked for: new inputs need not have them
        key = "parquet.columns"
        check_fingerprint({key: found.get(key)}, {key: wanted}, output)
    if found and fixed is not None:
        check_fingerprint(found, make_fingerprint(config, model, fixed), output)
    return PassedColumns(wanted, fixed)


def prepare_readers(
    config: JobConfig, work: Work, cluster: Cluster, started: float, retry: Collection[str] | None = None
) -> ReaderConfig:
    """Return the readers' configuration, and start decoder processes while the model is loaded.

    `started` is when the run started, in Unix time.

    Decoders are only started ahead if the number of readers is known, and if readers do not start at once anyway.
    """
    output = work.writer.output
    reading = Reading(
        output.options,
        config.limits.max_bytes,
        config.parquet,
        work.writer.format.columns,
        config.on_changed,
        config.on_missing,
        config.fetch.for_reader(max(1, min(cluster.count_readers(), work.shards))),
    )
    reader = ReaderConfig(
        output,
        work.writer.format,
        reading,
        work.model.spec,
        config.limits,
        config.decode,
        config.thumbnails,
        frozenset(retry or ()),
        decoders=cluster.decoders,
        deadline=None if work.limit.seconds is None else started + work.limit.seconds,
    )
    if cluster.readers and not cluster.reads_early:
        for _ in range(cluster.count_tasks(work.shards)):
            _prepare_reader.remote(reader)
    return reader


def prepare_tagger(config: JobConfig, work: Work, cluster: Cluster, startup: Startup) -> TaggerConfig:
    """Return the actors' configuration. The first run that writes to an output writes its label table.

    An unusable checkpoint or machine is found before any image is read. Raises `ConfigError`.
    """
    model, output = work.model, work.writer.output
    threads, gpus = max(1, int(cluster.actor_cpus)), cluster.actor_gpus
    table = _find_labels(output)
    if table is None:
        with as_config_errors():
            table = claim_labels(output, startup.prepare(model))
    elif gpus or model.config.device == "cuda" or model.config.compile is True or model.config.dtype == "int8":
        startup.check_machine(model)
    if model.config.compile == "auto":
        worth_it = work.rows * model.vision_flops >= COMPILE_FLOPS["cuda" if gpus else "cpu"]
        resolved = model.config.model_copy(update={"compile": "auto" if worth_it else False})
        model = replace(model, config=resolved)
    return TaggerConfig(model, config.labels, table.head, threads, gpus)


@contextmanager
def as_config_errors() -> Iterator[None]:
    """Turn errors of the store, the checkpoint and the labels into `ConfigError`, except `Unreachable` and `NoSpace`.

    Before any work these are for the user to correct. With a store that does not answer, or that is full, the same
    command is run again.
    """
    try:
        yield
    except (Unreachable, NoSpace):
        raise
    except (StoreError, CheckpointError, LabelError) as error:
        raise ConfigError(str(error)) from error


def _find_labels(output: Output) -> LabelTable | None:
    with as_config_errors():
        try:
            return read_label_table(output)
        except NotFound:
            return None


@ray.remote(num_cpus=READER_CPUS, max_retries=0, runtime_env=READER_ENVIRONMENT)
def _prepare_reader(config: ReaderConfig) -> None:
    """Start a worker's decoders. If this task fails, the first shard's task does the same."""
    import ray.data  # noqa: F401  # the 300 modules that every task of Ray Data imports first

    prepare_reader(config)
