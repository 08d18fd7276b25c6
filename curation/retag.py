"""New labels, thresholds, templates or bands for an output, from its stored embeddings. No image is read.

The result is an output like any other. It has the plan of its source, so its shards are the same, and the fingerprint
that `sightline tag` would give it with the new label set: a nightly job can continue in it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from ray.data import TaskPoolStrategy

from curation.model import OutputModel, find_texts
from curation.tagged_output import TaggedOutput, read_embeddings
from pipelines.cluster import RETRIES, WAVE_BLOCKS, connect, data_context, iterate_rows
from pipelines.config import RayConfig, absolute
from pipelines.output.commit import put_commit
from pipelines.output.fingerprint import check_folder, claim_output, describe_labels
from pipelines.output.label_columns import count_labels, make_label_columns
from pipelines.output.labels import LabelTable, claim_labels
from pipelines.output.ledger import Ledger
from pipelines.output.output import Output
from pipelines.output.row_files import RowFile, dump_files, load_files, read_slices
from pipelines.output.state import OutputState, read_state
from pipelines.output.writer import OutputWriter
from pipelines.planning.plan import ShardRef, read_plan
from pipelines.progress import Progress
from pipelines.tables.publication import Publication
from siglip.config import ModelConfig
from siglip.families import FAMILIES
from siglip.heads import build_head, check_model, tag_embeddings
from siglip.labels import LabelSet
from storage.files import download
from storage.settings import ConfigError
from storage.store import StoreError, StoreOptions

SHARDS_A_TASK = 16
"""The most shards in a Ray task, if there are enough tasks for all workers."""
_SHARDS_AT_ONCE = 2
"""Shards that a task processes at the same time: one waits for the store while the other is scored."""
_BATCH_ROWS = 1024
"""Rows that are scored at once."""


@dataclass(frozen=True)
class Retagged:
    """The result of a retagging. `shards`, `rows` and `changed` are of this run, `manifest` is of the whole output.

    `shards` is 0 if there was nothing left to do. `changed` counts the rows whose labels or bands are different now.
    """

    shards: int
    rows: int
    changed: int
    manifest: dict[str, Any]


@dataclass(frozen=True)
class RetagConfig:
    """The configuration of a retag task: the output to read, the writer of the new one, and the new label table."""

    source: Output
    writer: OutputWriter
    table: LabelTable


def retag_output(
    output: TaggedOutput,
    labels: LabelSet,
    target: str,
    progress: Progress,
    model: ModelConfig | None = None,
    address: str | None = None,
) -> Retagged:
    """Write `target`: the output's images with the labels that a label set gives to their embeddings.

    With float32 embeddings, the result is what `sightline tag` would write; with the output's own label set, to the
    last bit. With float16 embeddings, scores differ by up to about 1e-3. A call that was killed can be repeated, and
    does what is left; a call after the output has grown does the new shards.

    `model` replaces the model that the output names, and is loaded only for prompts that the output does not hold.
    `address` is the address of a Ray cluster to join. Raises `ConfigError` if the target is the output itself, was made
    with other settings, or if the model is a different one; `CheckpointError`, `LabelError`, `StoreError`.
    """
    rule, options = FAMILIES[output.table.family], StoreOptions.from_environment()
    source, new = (Output(uri, options, patient=True) for uri in (output.uri, absolute(target).rstrip("/")))
    if new.uri == output.uri:
        raise ConfigError(f"{new.uri} is the output itself: give another folder for the new one")
    check_folder(new)
    labels.check(rule)
    check_model(labels, output.weights, output.width)
    texts = find_texts(output, labels)
    if texts is None:
        progress.say("embedding the labels")
        texts = OutputModel(output, model).embed_labels(labels)
    head = build_head(labels, texts, output.table.scale, output.weights)
    table = replace(output.table, labels=labels, head=head, prompts=labels.prompts(rule))
    kept = {key: value for key, value in output.fingerprint.items() if not key.startswith("labels.")}
    fingerprint = {**kept, **describe_labels(labels, rule)}
    text = claim_output(new, fingerprint)
    table = claim_labels(new, table)
    for segment in source.segments():
        path = source.path_of(segment.uri)
        new.put_if_absent(path, source.read(path))
    publication = Publication()
    state = read_state(new, read_plan(new, inputs=False), publication)
    planned, pending = _list_pending(output.ledger, state)
    rows = changed = 0
    if pending:
        progress.say("starting Ray")
        format_ = replace(output.format, bands=labels.has_bands())
        task = RetagConfig(source, OutputWriter(new, format_, text), table)
        with connect(RayConfig(address=address)) as cluster, data_context(cluster):
            progress.start(len(pending), sum(ref.rows for ref in pending))
            state.announce({int(ref.shard[:6]) for ref in pending})
            for start in range(0, len(pending), WAVE_BLOCKS):
                wave = _add_files(pending[start : start + WAVE_BLOCKS], output.ledger)
                for receipt in iterate_rows(_build_dataset(wave, task, cluster.count_tasks(len(wave)))):
                    state.add(json.loads(receipt["record"]))
                    rows, changed = rows + receipt["rows"], changed + receipt["changed"]
                    progress.update(rows=receipt["rows"], shards=1)
    run = {"retagged_from": output.uri, "rows": rows, "changed": changed}
    manifest = state.finish(fingerprint, run, [], planned)
    if publication.failure:
        raise StoreError(publication.failure)
    return Retagged(len(pending), rows, changed, manifest)


def _list_pending(source: Ledger, state: OutputState) -> tuple[int, list[ShardRef]]:
    """Return the number of shards of the source, and those of them that the new output does not have."""
    planned, pending = 0, []
    for segment in state.plan.segments:
        wanted, done = (ledger.generations(segment.number, len(segment)) for ledger in (source, state.ledger))
        planned += int((wanted >= 0).sum())
        for index in np.flatnonzero(done < wanted).tolist():
            pending.append(replace(segment.ref(index), generation=int(wanted[index])))
    return planned, pending


def _add_files(refs: list[ShardRef], source: Ledger) -> list[ShardRef]:
    found = source.find_files(ref.shard for ref in refs)
    return [replace(ref, files=dump_files(found[ref.shard])) for ref in refs]


def retag_shard(ref: ShardRef, config: RetagConfig) -> tuple[int, int, dict[str, Any]]:
    """Retag and commit one shard. Return its number of tagged rows, how many of them changed, and its commit record.

    Memory holds one row group, and the stored file if it is small; a larger file is downloaded to the local disk. May
    be repeated at any time: the first commit is kept. Raises `StoreError` if a file is not the one that the shard's
    commit record names.
    """
    record = config.source.read_commit(ref.shard, ref.generation)
    counts = _Counts()
    writer = config.writer
    with writer.open_files("data", ref.name) as data, writer.open_files("rejects", ref.name) as rejects:
        for file in load_files(ref.files):
            with _open_checked(config.source, file) as stored:
                for _, batch in read_slices(stored, [(ref.shard, file)]):
                    rows = pa.Table.from_batches([batch])
                    if file.kind == "data":
                        data.add(_retag_group(rows, config, counts))
                    else:
                        rejects.add(rows.cast(rejects.schema))
    written = [*data.entries, *rejects.entries]
    told = {"reasons": record["reasons"], "labels": dict(counts.labels), "skipped": record.get("skipped", {})}
    return counts.rows, counts.changed, put_commit(config.writer, ref, record["rows_in"], written, told)


@dataclass
class _Counts:
    """The rows of a shard, how many of them changed, and how many images have each label as their best one."""

    rows: int = 0
    changed: int = 0
    labels: Counter[str] = field(default_factory=Counter)


def _retag_group(before: pa.Table, config: RetagConfig, counts: _Counts) -> pa.Table:
    """Return rows of a data file with new labels, scores and bands. Adds to `counts`."""
    after = _retag_rows(before, config)
    counts.rows += after.num_rows
    counts.changed += count_changes(before, after)
    counts.labels.update(count_labels(after["labels"]))
    return after


def _retag_rows(before: pa.Table, config: RetagConfig) -> pa.Table:
    """Return rows with the labels, scores and bands that their embeddings get, in the schema of the new output."""
    schema = config.writer.format.data_schema()
    made: dict[str, list[pa.Array]] = {}
    for batch in before.select(["embedding"]).to_batches(_BATCH_ROWS):
        chosen = tag_embeddings(read_embeddings(batch), config.table.labels, config.table.head)
        for name, column in make_label_columns(chosen, config.table.labels, np.ones(len(batch), bool)).items():
            made.setdefault(name, []).append(column)
    columns = {name: pa.chunked_array(made[name]) if name in made else before[name] for name in schema.names}
    return pa.table(columns).cast(schema)


def count_changes(before: pa.Table, after: pa.Table) -> int:
    """Count the rows whose labels, the order of their labels, or their bands differ. A different score does not count.

    Bands are only compared if both tables have them.
    """
    differs = np.zeros(before.num_rows, bool)
    for name in ("labels", "bands"):
        if name in before.column_names and name in after.column_names:
            differs |= _differ(before[name].combine_chunks(), after[name].combine_chunks())
    return int(np.count_nonzero(differs))


def _differ(one: pa.ListArray, other: pa.ListArray) -> np.ndarray:
    """Compare two columns of string lists row by row. Returns bool (N,), true where the lists differ."""
    counts = one.value_lengths().to_numpy(), other.value_lengths().to_numpy()
    differs = counts[0] != counts[1]
    # In the rows with lists of equal length, the items of the two columns are aligned.
    items = [
        column.flatten().filter(pa.array(~np.repeat(differs, count)))
        for column, count in zip((one, other), counts, strict=True)
    ]
    unequal = np.asarray(pc.not_equal(*items))
    rows = np.repeat(np.flatnonzero(~differs), counts[0][~differs])
    differs[rows[unequal]] = True
    return np.asarray(differs)


@contextmanager
def _open_checked(output: Output, file: RowFile) -> Iterator[pq.ParquetFile]:
    """Open a file of a shard. Raises `StoreError` if its SHA-256 is not that of the ledger.

    Of a file that holds the rows of several shards, only some are read, so that its SHA-256 is not known.
    """
    with output.open_rows(file.path, file.bytes) as parquet:
        if parquet.metadata.num_rows > file.rows:
            yield parquet
            return
    with download(output.store, output.uri_of(file.path)) as stored:
        if stored.sha256 != file.sha256:
            raise StoreError(
                f"{output.uri_of(file.path)} is not the file that its shard's commit names: it was overwritten, or is "
                "damaged"
            )
        with pq.ParquetFile(stored.file) as parquet:
            yield parquet


def _build_dataset(pending: list[ShardRef], config: RetagConfig, tasks: int) -> ray.data.Dataset:
    """Build the dataset whose rows are receipts, one for each shard.

    A task processes several shards, because starting a task takes longer than retagging a shard.
    """

    def retag(block: pa.Table) -> Iterator[pa.Table]:
        refs = [ShardRef(**row) for row in block.to_pylist()]
        with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
            for rows, changed, record in pool.map(retag_shard, refs, repeat(config)):
                yield pa.table({"rows": [rows], "changed": [changed], "record": [json.dumps(record)]})

    blocks = min(len(pending), max(4 * tasks, len(pending) // SHARDS_A_TASK))
    return ray.data.from_items([asdict(ref) for ref in pending], override_num_blocks=blocks).map_batches(
        retag,
        batch_size=None,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(size=tasks),
        num_cpus=1,
        max_retries=RETRIES,
    )
