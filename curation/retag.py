"""New labels, thresholds, templates or bands for an output, from its embeddings: no image is read again.

What comes out is an output like any other. It has the plan of the one before, so that its shards are the same, and the
fingerprint that `sightline tag` would give it: the nightly job can go on in it, with the new label set.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from ray.data import TaskPoolStrategy

from curation.tagged_output import TaggedOutput, read_embeddings
from pipelines.cluster import RETRIES, connect, data_context, iterate_rows
from pipelines.column_chunks import replace_columns
from pipelines.config import JobConfig, RayConfig
from pipelines.inputs.plan import ShardRef, list_segments, list_shards
from pipelines.output.commit import ENCODING, count_labels, file_metadata, put_commit, put_file
from pipelines.output.fingerprint import claim_output, describe_labels
from pipelines.output.label_columns import make_label_columns
from pipelines.output.labels import LabelTable, claim_labels
from pipelines.output.layout import finish_output, list_commits, read_commit
from pipelines.output.parts import PartWriter
from pipelines.run_report import Progress
from siglip.checkpoint import pin_model
from siglip.config import ModelConfig
from siglip.families import FAMILIES
from siglip.heads import build_head, check_probes, tag_embeddings
from siglip.labels import LabelSet
from siglip.scoring import Floats
from storage.mirror import Mirror
from storage.schemes import open_store
from storage.settings import ConfigError
from storage.store import Store, StoreError, StoreOptions, join

SHARDS_A_TASK = 16
_SHARDS_AT_ONCE = 2
"""In a task: one waits for the store while another is scored."""
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Retagged:
    """How a retagging ended: of this run alone `rows`, and of them those whose labels or bands are `changed`.

    `shards` is how many were done now, 0 where nothing was left to do.
    """

    shards: int
    rows: int
    changed: int
    manifest: dict[str, Any]


@dataclass(frozen=True)
class RetagConfig:
    """What a task needs: where the rows come from, and what they become."""

    source: str
    options: StoreOptions
    writer: PartWriter
    table: LabelTable


def find_texts(output: TaggedOutput, labels: LabelSet) -> Floats | None:
    """The averages (L, D) of a label set's prompts, if the output was asked each of its labels with the same ones.

    So that other thresholds, bands, groups or calibrations, fewer labels or another order need no model.
    """
    old = output.table
    known = {
        tuple(prompts): old.head.vectors[row]
        for row, (prompts, label) in enumerate(zip(old.prompts, old.labels.names, strict=True))
        if label.probe is None
    }
    empty = np.zeros(output.width, np.float32)  # a probe's
    rows = [known.get(tuple(prompts)) if prompts else empty for prompts in labels.prompts(FAMILIES[old.family])]
    return None if any(row is None for row in rows) else np.asarray(rows, np.float32)


def embed_labels(output: TaggedOutput, labels: LabelSet, config: ModelConfig) -> Floats:
    """A label set's averages (L, D) by the model that made an output's embeddings.

    Raises `ConfigError` when `config` names another one, `siglip.checkpoint.CheckpointError` when it cannot be used,
    `siglip.labels.LabelError`.
    """
    from siglip.encoder import Encoder

    model = pin_model(
        config.model_copy(update={"compile": False}), Mirror(StoreOptions.from_environment(config.endpoint))
    )
    if model.identity != output.weights:
        raise ConfigError(
            f"{output.uri} has embeddings of the model {output.weights[:16]}, and {config.source} is "
            f"{model.identity[:16]}: name the checkpoint that tagged it with --model"
        )
    return Encoder(model).embed_labels(labels)


def retag_output(
    output: TaggedOutput,
    labels: LabelSet,
    target: str,
    progress: Progress,
    model: ModelConfig | None = None,
    address: str | None = None,
) -> Retagged:
    """Write `target`: the output's images, each once, with the labels that a label set gives to its embeddings.

    With float32 embeddings they are what `sightline tag` would give, to the last bit with the output's own label set;
    with float16 ones scores are off by up to about 1e-3. Killed at any moment and called again, it does what is left;
    so it does when the output has grown. `model` stands in for the one that the output names, which is asked for labels
    that the output was not; `address` is a Ray to join.

    Raises `ConfigError` when the target is the output itself or was made with other settings, and for another model;
    `CheckpointError`, `LabelError`, `StoreError`.
    """
    rule, options = FAMILIES[output.table.family], StoreOptions.from_environment()
    config = JobConfig(input=(output.uri,), output=target, labels=labels, ray=RayConfig(address=address))
    target = config.output
    if target == output.uri:
        raise ConfigError(f"{target} is the output itself: the new one stands beside it")
    labels.check(rule)
    check_probes(labels, output.weights, output.width)
    texts = find_texts(output, labels)
    if texts is None:
        progress.say("embedding the labels")
        texts = embed_labels(output, labels, model or output.table.model)
    head = build_head(labels, texts, output.table.scale, output.weights)
    table = replace(output.table, labels=labels, head=head, prompts=labels.prompts(rule))
    kept = {key: value for key, value in output.fingerprint.items() if not key.startswith("labels.")}
    fingerprint = {**kept, **describe_labels(labels, rule)}
    store = open_store(target, options)
    text = claim_output(store, target, fingerprint)
    table = claim_labels(store, target, table)
    for segment in list_segments(output.store, output.uri):
        store.put_if_absent(join(target, "plan", segment.uri.rpartition("/")[2]), output.store.read(segment.uri))
    there, wanted = list_commits(store, target), list_commits(output.store, output.uri)
    planned = [replace(ref, generation=wanted[ref.shard]) for ref in list_shards(store, target) if ref.shard in wanted]
    pending = [ref for ref in planned if there.get(ref.shard, -1) < ref.generation]
    rows = changed = 0
    if pending:
        progress.say("starting Ray")
        format_ = replace(output.format, bands=labels.has_bands())
        task = RetagConfig(output.uri, options, PartWriter(target, options, format_, text), table)
        with connect(config) as cluster, data_context(cluster):
            progress.start(len(pending), sum(ref.rows for ref in pending))
            for receipt in iterate_rows(_build_dataset(pending, task, cluster.count_tasks(len(pending)))):
                rows, changed = rows + receipt["rows"], changed + receipt["changed"]
                progress.update(rows=receipt["rows"], shards=1)
    run = {"retagged_from": output.uri, "rows": rows, "changed": changed}
    names = [ref.shard for ref in planned]
    return Retagged(len(pending), rows, changed, finish_output(store, target, fingerprint, names, run, []))


def retag_shard(ref: ShardRef, config: RetagConfig) -> tuple[int, int]:
    """Commit one shard anew. Returns its tagged rows, and those of them that changed.

    Holds one of the shard's files in memory at a time. May be done again at any time: the first commit stands. Raises
    `StoreError` when a file is not the one that the shard's record names.
    """
    source, target = open_store(config.source, config.options), config.writer.open()
    record = read_commit(source, config.source, ref.shard, ref.generation)
    written, rows, changed = [], 0, 0
    labels: Counter[str] = Counter()
    for file in record["files"]:
        kind, _, _ = file["path"].partition("/")
        data = _read(source, join(config.source, file["path"]), file["sha256"])
        if kind == "data":
            data, counts, differ = retag_file(data, config)
            labels.update(counts)
            rows, changed = rows + file["rows"], changed + differ
        else:
            schema = config.writer.format.rejects_schema().with_metadata(file_metadata(config.writer))
            data = replace_columns(data, pa.table({}), schema)
        written.append(put_file(target, config.writer, kind, ref, file["rows"], data))
    told = {"reasons": record["reasons"], "labels": dict(labels), "skipped": record.get("skipped", {})}
    put_commit(target, config.writer, ref, record["rows_in"], written, told)
    return rows, changed


def retag_file(data: bytes, config: RetagConfig) -> tuple[bytes, dict[str, int], int]:
    """A file of `data/` with the labels, scores and bands that its embeddings have now, the rest as the bytes it was.

    With how many images carry each label, and how many rows changed.
    """
    schema = config.writer.format.data_schema().with_metadata(file_metadata(config.writer))
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        wanted = [name for name in ("embedding", "labels", "bands") if name in file.schema_arrow.names]
        before = file.read(wanted)
    made: dict[str, list[pa.Array]] = {}
    for batch in before.select(["embedding"]).to_batches(_BATCH_ROWS):
        chosen = tag_embeddings(read_embeddings(batch), config.table.labels, config.table.head)
        for name, column in make_label_columns(chosen, config.table.labels, np.ones(len(batch), bool)).items():
            made.setdefault(name, []).append(column.cast(schema.field(name).type))
    after = pa.table({name: pa.chunked_array(columns) for name, columns in made.items()})
    new = replace_columns(data, after, schema, **ENCODING)
    return new, count_labels(after["labels"]), count_changes(before, after)


def count_changes(before: pa.Table, after: pa.Table) -> int:
    """The rows whose labels, or their order, or their bands where both have them, are others.

    A score that moved without that is no change.
    """
    differs = np.zeros(before.num_rows, bool)
    for name in ("labels", "bands"):
        if name in before.column_names and name in after.column_names:
            differs |= _differ(before[name].combine_chunks(), after[name].combine_chunks())
    return int(np.count_nonzero(differs))


def _differ(one: pa.ListArray, other: pa.ListArray) -> np.ndarray:
    """For each row whether two lists of strings differ."""
    counts = one.value_lengths().to_numpy(), other.value_lengths().to_numpy()
    differs = counts[0] != counts[1]
    # Where the lengths agree, the items stand side by side.
    items = [
        column.flatten().filter(pa.array(~np.repeat(differs, count)))
        for column, count in zip((one, other), counts, strict=True)
    ]
    unequal = np.asarray(pc.not_equal(*items))
    rows = np.repeat(np.flatnonzero(~differs), counts[0][~differs])
    differs[rows[unequal]] = True
    return np.asarray(differs)


def _read(store: Store, uri: str, sha256: str) -> bytes:
    data = store.read(uri)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise StoreError(
            f"{uri} is not the file that its shard's commit record names: it was written over, or is damaged"
        )
    return data


def _build_dataset(pending: list[ShardRef], config: RetagConfig, tasks: int) -> ray.data.Dataset:
    """A receipt for each shard. A task does several shards, because one is done sooner than a task is started."""

    def retag(block: pa.Table) -> Iterator[pa.Table]:
        refs = [ShardRef(**row) for row in block.to_pylist()]
        with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
            for rows, changed in pool.map(retag_shard, refs, repeat(config)):
                yield pa.table({"rows": [rows], "changed": [changed]})

    blocks = min(len(pending), max(4 * tasks, len(pending) // SHARDS_A_TASK))
    return ray.data.from_items([asdict(ref) for ref in pending], override_num_blocks=blocks).map_batches(
        retag,
        batch_size=None,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(size=tasks),
        num_cpus=1,
        max_retries=RETRIES,
    )
