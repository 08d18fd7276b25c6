"""Synthetic outputs of any size, written without images or a model. For benchmarks and tests of readers of outputs."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.inputs.rows import Input
from pipelines.output.commit import put_commit
from pipelines.output.fingerprint import claim_output, describe_labels
from pipelines.output.label_columns import count_labels, make_label_columns
from pipelines.output.labels import LabelTable, claim_labels
from pipelines.output.output import FINGERPRINT, Output
from pipelines.output.schema import DATA_SCHEMA_VERSION, OutputFormat
from pipelines.output.state import read_state
from pipelines.output.writer import OutputWriter
from pipelines.planning.packing import SEGMENT_SHARDS, SegmentWriter
from pipelines.planning.plan import read_plan
from siglip.config import ModelConfig
from siglip.families import siglip
from siglip.heads import LinearHead, build_head, tag_embeddings
from siglip.labels import LabelSet
from siglip.scoring import Floats, Scale

SCALE = Scale(117.33, -12.93)
"""The logit scale and bias of siglip-base-patch16-256. The SigLIP paper starts training at 10 and -10."""

MODEL = ModelConfig(source="made-up")


@dataclass(frozen=True)
class SyntheticOutput:
    """The content of a synthetic output.

    `embed(shard)` returns a shard's embeddings, float32 (N, D) of unit norm; it is called several times for a shard.
    `texts` are the averaged prompt embeddings of the labels, float32 (L, D). `reject(shard)` returns the reasons of a
    shard's rejected rows, which come after the tagged ones. `thumbnail(row)` returns JPEG bytes. `row` counts the
    tagged rows of the whole output. `digest(row)` returns a text that stands for the image's bytes in `sha256`.
    `passed` are the passed-through columns. `values(rows)` returns their values, and those of other columns that are
    not to be made up, such as `source`.
    """

    labels: LabelSet
    texts: Floats
    shards: int
    embed: Callable[[int], Floats]
    dtype: str = "float32"
    scale: Scale = SCALE
    model: ModelConfig = MODEL
    weights: str = "made-up"
    reject: Callable[[int], Sequence[str]] = lambda shard: ()
    thumbnail: Callable[[int], bytes] | None = None
    key: Callable[[int], str] = "image {:08d}".format
    digest: Callable[[int], str] = str
    passed: pa.Schema = field(default_factory=lambda: pa.schema([]))
    values: Callable[[range], Mapping[str, Any]] = lambda rows: {}


def write_output(root: str, made: SyntheticOutput) -> LinearHead:
    """Write a finished output, with all files that a run of `sightline tag` writes. Return its head."""
    output = Output(root)
    head = build_head(made.labels, made.texts, made.scale, made.weights)
    columns = made.passed
    fingerprint = {
        "schema_version": DATA_SCHEMA_VERSION,
        "model.weights": made.weights,
        **describe_labels(made.labels, siglip),
        "embedding_dtype": made.dtype,
        "thumbnails": 256 if made.thumbnail else None,
        "parquet.columns": {name: name for name in columns.names},
        "parquet.schema": base64.b64encode(columns.serialize()).decode(),
    }
    text = claim_output(output, fingerprint)
    prompts = made.labels.prompts(siglip)
    claim_labels(output, LabelTable(made.labels, head, prompts, made.model, made.weights, siglip.NAME, made.scale))
    _commit(output, made, head, fingerprint, text, 0)
    return head


def grow_output(root: str, made: SyntheticOutput, first: int) -> None:
    """Add the shards of `made` from number `first` on to an output that has those before, as a later run does."""
    output = Output(root)
    head = build_head(made.labels, made.texts, made.scale, made.weights)
    _commit(output, made, head, output.read_json(FINGERPRINT), output.read(FINGERPRINT).decode(), first)


def _commit(
    output: Output, made: SyntheticOutput, head: LinearHead, fingerprint: dict[str, Any], text: str, first: int
) -> None:
    """Plan and commit the shards from number `first` on, and finish the output."""
    counts = [(len(made.embed(shard)), len(made.reject(shard))) for shard in range(made.shards)]
    _write_plan(output, counts[first:], first)
    format_ = OutputFormat(
        head.vectors.shape[1],
        "float16" if made.dtype == "float16" else "float32",
        made.thumbnail is not None,
        made.passed,
        bands=made.labels.has_bands(),
    )
    writer = OutputWriter(output, format_, text)
    state = read_state(output, read_plan(output))
    row = sum(tagged for tagged, _ in counts[:first])
    for number, ref in enumerate(list(state.list_pending()), start=first):
        data = _make_rows(made, head, format_, number, row)
        row += data.num_rows
        reasons = made.reject(number)
        rejects = pa.Table.from_pylist(
            [
                {
                    "key": f"reject {number} {place}",
                    "source": f"made/{number:06d}.tar",
                    "row": data.num_rows + place,
                    "stage": "decode",
                    "reason": reason,
                    "detail": f"made up: {reason}",
                }
                for place, reason in enumerate(reasons)
            ],
            schema=format_.rejects_schema(),
        )
        with writer.open_files("data", ref.name) as tagged, writer.open_files("rejects", ref.name) as rejected:
            tagged.add(data)
            rejected.add(rejects)
        files = [*tagged.entries, *rejected.entries]
        told = {"reasons": dict(Counter(reasons)), "labels": count_labels(data["labels"]), "skipped": {}}
        state.add(put_commit(writer, ref, data.num_rows + len(reasons), files, told))
    run = {"seconds": 60.0, "rows": sum(map(sum, counts[first:])), "images_per_second": 100.0, "limited_by": "model"}
    state.finish(fingerprint, run, [])


def _make_rows(made: SyntheticOutput, head: LinearHead, format_: OutputFormat, shard: int, first: int) -> pa.Table:
    vectors = made.embed(shard)
    count = len(vectors)
    stored = vectors.astype(np.float16) if made.dtype == "float16" else vectors
    chosen = tag_embeddings(vectors, made.labels, head)
    rows = range(first, first + count)
    columns = {
        "key": [made.key(row) for row in rows],
        "source": [f"made/{shard:06d}.tar"] * count,
        "row": np.arange(count),
        "width": np.full(count, 640, np.int32),
        "height": np.full(count, 480, np.int32),
        **make_label_columns(chosen, made.labels, np.ones(count, bool)),
        "sha256": [hashlib.sha256(made.digest(row).encode()).hexdigest() for row in rows],
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), vectors.shape[1]),
        "metadata": pa.nulls(count, pa.string()),
    }
    if made.thumbnail is not None:
        columns["thumbnail"] = [made.thumbnail(row) for row in rows]
    columns.update(made.values(rows))
    return pa.table({name: columns[name] for name in format_.data_schema().names}).cast(format_.data_schema())


def _write_plan(output: Output, counts: Sequence[tuple[int, int]], first: int) -> None:
    """Plan shards with these numbers of rows, the first of which has the number `first`."""
    next_number = read_plan(output).next_number
    for start in range(0, len(counts), SEGMENT_SHARDS):
        segment = SegmentWriter(next_number + start // SEGMENT_SHARDS)
        for shard, count in enumerate(counts[start : start + SEGMENT_SHARDS], start=first + start):
            uri = f"made/{shard:06d}.tar"
            segment.add([Input("tar", uri, uri, 1, "made-up", rows=sum(count))])
        output.put_if_absent(f"plan/{next_number + start // SEGMENT_SHARDS:06d}.parquet", segment.close())
