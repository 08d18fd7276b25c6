"""The columns of an output, and how its Parquet files are encoded.

This is the only module that lists the output's columns. The schemas of the blocks between the stages, of part files and
of the final files derive from it. A new column needs a line here, and a value from the stage that computes it: from
`pipelines.stages.reader`, or from `pipelines.output.label_columns` if it depends on the model.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

DATA_SCHEMA_VERSION = 1
"""Version of the columns in `data/` and `rejects/`. It is part of the fingerprint: two versions of Sightline that write
different columns never write to the same output."""
COLUMN_PREFIX = "column:"
"""Prefix of passed-through columns until their shard is committed. It allows names that the stages use themselves."""
MODEL_COLUMNS = frozenset(["labels", "scores", "bands", "embedding"])
"""The columns that the tagger adds. The reader fills all others."""
ROW_GROUP_ROWS, ROW_GROUP_BYTES = 4096, 64 * 2**20
"""A row group of `data/` and `rejects/` ends with this number of rows, or when its rows reach this number of bytes in
memory. It may exceed the bytes by one part (see `pipelines.stages.parts`)."""
FILE_BYTES = 256 * 2**20
"""A file of `data/` or `rejects/` ends with the row group with which it reaches this size. A shard may have several: a
tar is one shard, however many images it has."""

_EMBEDDING_PATH = "embedding.list.element"
_DICTIONARIES = ["source", "labels.list.element", "bands.list.element", "stage", "reason"]


@dataclass(frozen=True)
class OutputFormat:
    """The parts of an output's schema that depend on the configuration.

    `width` is the number of dimensions of an embedding. `columns` are the columns passed through from Parquet inputs.
    `bands` is true if the label set has `accept` scores, and adds the column `bands`.
    """

    width: int
    embedding_dtype: Literal["float32", "float16"]
    thumbnails: bool
    columns: pa.Schema
    bands: bool = False

    def data_schema(self) -> pa.Schema:
        """Return the schema of `data/`, which has one row for each tagged image."""
        return pa.schema([*self._own_fields(), *self.columns])

    def rejects_schema(self) -> pa.Schema:
        """Return the schema of `rejects/`, which has one row for each image that could not be tagged."""
        names = ("key", "source", "row", "stage", "reason", "detail")
        return pa.schema([pa.field(name, pa.int64() if name == "row" else pa.string()) for name in names])

    def part_schema(self) -> pa.Schema:
        """Return the schema of part files, which hold tagged and rejected rows: all columns of both, all nullable."""
        passed = [field.with_name(COLUMN_PREFIX + field.name) for field in self.columns]
        own = self._own_fields()
        reject = [field for field in self.rejects_schema() if field.name not in {field.name for field in own}]
        return pa.schema([field.with_nullable(True) for field in [*own, *reject, *passed]])

    def block_schema(self) -> pa.Schema:
        """Return the schema of the blocks that readers send to actors: a part's columns, pixels and measurements."""
        own = [field for field in self.part_schema() if field.name not in MODEL_COLUMNS]
        return pa.schema(
            [
                *own,
                pa.field("shard", pa.string()),
                pa.field("summary", pa.string()),
                pa.field("read_s", pa.float32()),
                pa.field("decode_s", pa.float32()),
                pa.field("ready_at", pa.float64()),
                pa.field("pixels", pa.large_binary()),
            ]
        )

    def _own_fields(self) -> list[pa.Field]:
        dtype = pa.float16() if self.embedding_dtype == "float16" else pa.float32()
        fields = [
            pa.field("key", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("row", pa.int64(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("labels", pa.list_(pa.string())),
            pa.field("scores", pa.list_(pa.float32())),
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(dtype, self.width)),
            pa.field("metadata", pa.string()),
        ]
        if self.bands:
            fields.append(pa.field("bands", pa.list_(pa.string())))
        if self.thumbnails:
            fields.append(pa.field("thumbnail", pa.binary()))
        return fields


OWN_COLUMNS = frozenset(OutputFormat(1, "float32", True, pa.schema([]), bands=True).data_schema().names)
"""The columns that an output may have besides the passed-through ones, which must not have these names."""


@lru_cache(maxsize=16)
def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """Return the options of `pyarrow.parquet.ParquetWriter` for a file of `data/` or `rejects/` with this schema.

    Embeddings are close to random bits, so they are stored uncompressed: compression saves 8 % of a file, and takes
    most of the time in which `sightline retag` writes one. All other columns are compressed with zstd. Dictionaries are
    only used for columns with few distinct values; for scores and embeddings they cost time and save nothing.
    """
    buffer = io.BytesIO()
    pq.write_table(schema.empty_table(), buffer)
    leaves = pq.ParquetFile(buffer).schema
    paths = [leaves.column(number).path for number in range(len(leaves))]
    return {
        "compression": {path: "none" if path == _EMBEDDING_PATH else "zstd" for path in paths},
        "use_dictionary": _DICTIONARIES,
    }
