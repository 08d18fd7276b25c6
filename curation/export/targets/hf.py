"""A Hugging Face dataset: Parquet shards in `data/`, and a dataset card, for `datasets.load_dataset(FOLDER)`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.export.job import EMBEDDING, Job, Target, add_vectors
from curation.tagged_output import TaggedOutput
from storage.settings import ConfigError

SHARD_BYTES = 500 * 2**20
"""A shard ends with the row group with which it reaches this size, in bytes in memory."""
_ROWS, _IMAGE_ROWS, _GROUP_BYTES = 4096, 96, 64 * 2**20
"""Rows of a row group without and with images, and the bytes with which a row group ends. The viewer of datasets reads
whole row groups, and 100 images are what `datasets` itself writes."""
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_FEATURES = {"info": {"features": {"image": {"_type": "Image"}}}}


def write(job: Job, path: str) -> None:
    """Write the dataset to a folder.

    Columns: `image` if the export has images, then those of `Job`, `embedding` as a list of D float32. Memory holds one
    row group: 4,096 rows, or with images at most 96 rows, of at most 64 MiB and one batch of `curation.export.images`.
    """
    schema = make_schema(job)
    folder = Path(path) / "data"
    folder.mkdir()
    shards = _write_shards(folder, schema, _make_batches(job, schema), _ROWS if job.images is None else _IMAGE_ROWS)
    for number in range(shards):
        os.rename(folder / f"{number}.parquet", folder / f"train-{number:05d}-of-{shards:05d}.parquet")
    (Path(path) / "README.md").write_text(_make_card(job.output, job.exported), encoding="utf-8")


def make_schema(job: Job) -> pa.Schema:
    """Return the schema of the shards. Its metadata tell `datasets` that `image` is an image."""
    schema = job.make_schema()
    if job.images is None:
        return schema
    metadata = {"huggingface": json.dumps(_FEATURES)}
    return pa.schema([pa.field("image", _IMAGE), *schema], metadata=metadata)


def _prepare(output: TaggedOutput, destination: str, with_images: bool) -> list[str]:
    if with_images and "image" in output.columns:
        raise ConfigError("the output has a column named image, so the images have no place: leave out the images")
    return [] if with_images else ["the dataset has no images: --images DIR or --thumbnails adds them"]


def _make_batches(job: Job, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    if job.images is None:
        for batch, vectors in job.batches(_ROWS):
            yield add_vectors(batch, vectors, schema)
        return
    plain = job.make_schema()
    for batch, vectors, pictures in job.pictures():
        values = [
            {"bytes": picture.data, "path": f"{key.rpartition('/')[2]}"}
            for picture, key in zip(pictures, batch["key"].to_pylist(), strict=True)
        ]
        columns = add_vectors(batch, vectors, plain).columns
        yield pa.RecordBatch.from_arrays([pa.array(values, _IMAGE), *columns], schema=schema)


def _write_shards(folder: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch], rows: int) -> int:
    """Write batches to files `0.parquet`, `1.parquet`, ... and return their number, which is at least one."""
    options = {
        "compression": {
            name: "none" if name.split(".")[0] in (EMBEDDING, "image") else "zstd" for name in _leaves(schema)
        },
        "use_dictionary": [name for name in ("source", "labels.list.element") if name.split(".")[0] in schema.names],
    }
    shards, written = 1, 0
    writer = pq.ParquetWriter(folder / "0.parquet", schema, **options)
    try:
        for group in _group(batches, rows):
            if written >= SHARD_BYTES:
                writer.close()
                writer = pq.ParquetWriter(folder / f"{shards}.parquet", schema, **options)
                shards, written = shards + 1, 0
            writer.write_table(group)
            written += group.nbytes
    finally:
        writer.close()
    return shards


def _group(batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(map(len, held)) >= rows or sum(one.nbytes for one in held) >= _GROUP_BYTES:
            yield pa.Table.from_batches(held)
            held = []
    if held:
        yield pa.Table.from_batches(held)


def _leaves(schema: pa.Schema) -> list[str]:
    """Return the paths of the schema's columns in a Parquet file, such as `labels.list.element`."""
    buffer = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), buffer)
    stored = pq.ParquetFile(pa.BufferReader(buffer.getvalue())).schema
    return [stored.column(number).path for number in range(len(stored))]


def _make_card(output: TaggedOutput, rows: int) -> str:
    """Return the text of the dataset card. The names of labels stand in it as JSON, which Markdown leaves as it is."""
    names = output.labels.label_names()
    listed = json.dumps(names, ensure_ascii=False, indent=1)
    scores = np.format_float_positional(np.float32(output.labels.threshold), trim="-")
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
tags:
- image-classification
- zero-shot
---

# Images tagged with Sightline

{rows:,} images, tagged with `{output.model}`.

- `labels`: the names of an image's labels, best first; a list that may be empty.
- `scores`: their probabilities, in the same order. Labels with a score under their threshold ({scores} if they have
  none of their own) are not in the list.
- `embedding`: {output.width} float32, of unit norm.
- `id`: identifies the image in the output of Sightline. `key` is its name in the input, `sha256` that of its bytes.

## Labels

All {len(names):,} labels that the images were scored with, in their order:

```json
{listed}
```
"""


TARGET = Target("possible", write, prepare=_prepare)
