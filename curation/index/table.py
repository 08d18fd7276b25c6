"""The index's table: the embeddings of an output in LanceDB, and the vector index over them.

LanceDB was chosen among faiss-cpu, usearch and LanceDB (`python -m benchmarks.index`; the figures are in
docs/search.md). All are fast enough. faiss and usearch keep an index in memory and write it as one file, so that each
night would write the whole anew, and each search would read the whole. LanceDB has versions, each made by one atomic
commit, on disks and in object stores: a reader stays at its version, and a build that is killed leaves the last one.

The vectors are quantised to 8 bits each (`IVF_SQ`), and those found are compared again as stored. Product
quantisation is smaller, and finds the images that are near an image. But texts lie far from all images, and the
differences among the images' similarities with a text are smaller than its error.

This module is the only one that calls LanceDB for an index.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curation.tagged_output import TaggedOutput, read_vectors
from pipelines.output.output import parse_shard, shard_id
from siglip.scoring import Floats
from storage.object_store import make_rust_options
from storage.settings import ConfigError
from storage.store import StoreError

if TYPE_CHECKING:
    from lancedb.table import Table

FOLDER = "index"
"""The folder of the index in its output."""
_TABLE, _INDEX, _LABELS = "images", "vectors", "labels"
_SHARDS_A_COMMAND = 1000
_MARGIN = timedelta(days=1)
_SAME_KEY = 1000
_SQ_SAMPLE = 256
"""Vectors for each partition that LanceDB wants to train it."""


@dataclass(frozen=True)
class Found:
    """Rows of the table, nearest first: `shards` and `rows`, int64 (K,), and `embeddings`, float32 (K, D)."""

    shards: NDArray[np.int64]
    rows: NDArray[np.int64]
    embeddings: Floats


class IndexTable:
    """The table of an output's index. Its rows are the images: shard, its generation, row, key, labels, embedding.

    A shard's number is `number_shard` of its name, a label's that of `curation.index.labels`. Every method raises
    `StoreError` for trouble that LanceDB has.
    """

    def __init__(self, output: TaggedOutput, table: Table) -> None:
        self.width = output.width
        self._table = table
        self._uri = output.output.uri_of(FOLDER)
        self.schema = make_schema(output)

    @classmethod
    def open(cls, output: TaggedOutput, version: int | None = None) -> IndexTable:
        """Open the table, at a version or at the last one, or make an empty one.

        A table of an earlier version of Sightline is made anew; readers of its versions go on. Searches read the whole
        vector index, and LanceDB keeps up to 6 GiB of it in memory; a lower limit made searches slower, and saved a
        fifth of the memory. Raises `ConfigError` if LanceDB is not installed.
        """
        lancedb = import_lancedb()
        uri = output.output.uri_of(FOLDER)
        with _errors(uri):
            options = make_rust_options(uri, output.output.options)
            # Not with a session that several tables share: it would know files of a folder that was since made anew.
            database = lancedb.connect(uri.removeprefix("file://"), storage_options=options)
            if version is None:
                schema, names = make_schema(output), database.list_tables().tables
                if _TABLE not in names or database.open_table(_TABLE).schema.names != schema.names:
                    table = database.create_table(_TABLE, schema=schema, mode="overwrite")
                else:
                    table = database.open_table(_TABLE)
            else:
                table = database.open_table(_TABLE)
                table.checkout(version)
        return cls(output, table)

    @property
    def version(self) -> int:
        """The number of the version that this table is at."""
        with self._errors():
            return int(self._table.version)

    @property
    def rows(self) -> int:
        """The number of rows."""
        with self._errors():
            return int(self._table.count_rows())

    def count_shards(self) -> dict[int, tuple[int, int]]:
        """Return for each shard its generation and its number of rows. Reads two numbers of each row.

        A shard of which rows of several generations are there has the generation -1.
        """
        counts: dict[int, tuple[int, int]] = {}
        with self._errors():
            for batch in self._table.search().select(["shard", "generation"]).to_batches(65_536):
                pairs = np.stack([batch["shard"].to_numpy(), batch["generation"].to_numpy().astype(np.int64)])
                for (shard, generation), count in zip(*_unique_pairs(pairs), strict=True):
                    before = counts.get(shard, (generation, 0))
                    counts[shard] = (generation if before[0] == generation else -1, before[1] + count)
        return counts

    def add(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Add rows, with one commit. Memory holds a few batches. Raises what `batches` raises."""
        failures: list[Exception] = []

        def read() -> Iterator[pa.RecordBatch]:
            try:
                yield from batches
            except Exception as error:
                failures.append(error)
                raise

        try:
            with self._errors():
                self._table.add(pa.RecordBatchReader.from_batches(self.schema, read()))
        except StoreError:
            if failures:  # LanceDB raises an error of its own in its place
                raise failures[0] from None
            raise

    def delete(self, shards: Sequence[int]) -> None:
        """Delete the rows of shards."""
        for start in range(0, len(shards), _SHARDS_A_COMMAND):
            with self._errors():
                self._table.delete(f"shard IN ({_join(shards[start : start + _SHARDS_A_COMMAND])})")

    def train(self) -> int:
        """Make the vector index and that of the labels anew. Return the number of the vector index's partitions."""
        from lancedb.index import IvfSq, LabelList

        partitions = count_partitions(self.rows)
        with self._errors():
            config = IvfSq(distance_type="cosine", num_partitions=partitions)
            self._table.create_index("vector", config=config, replace=True, name=_INDEX)
            self._table.create_index("labels", config=LabelList(), replace=True, name=_LABELS)
        return partitions

    def is_trained(self) -> bool:
        """Tell whether there is a vector index."""
        with self._errors():
            return any(index.name == _INDEX for index in self._table.list_indices())

    def take_up(self) -> None:
        """Take up added rows in the vector index, and merge small files. Nothing that a version needs is deleted."""
        with self._errors():
            self._table.optimize(cleanup_older_than=timedelta(days=36_500))

    def clean(self, oldest: int) -> None:
        """Merge small files, and delete those of versions that were more than a day old when version `oldest` was made.

        Files of a process that was killed stay for a week, until they cannot be of one that is at work.
        """
        with self._errors():
            # LanceDB deletes by age, counted from when it comes to it, and refuses to where an older version is tagged.
            times = [about["timestamp"] for about in self._table.list_versions() if about["version"] == oldest]
            if times:
                age = datetime.now(UTC) - times[0].astimezone(UTC)  # it is in local time
                self._table.optimize(cleanup_older_than=max(age, timedelta(0)) + _MARGIN)

    def count(self, labels: Sequence[int], without: Sequence[int] = ()) -> int:
        """Return how many rows have all of some labels, given by their numbers, and are of no shard in `without`."""
        with self._errors():
            return int(self._table.count_rows(_make_filter(labels, without)))

    def find(
        self, vector: Floats, count: int, probes: int, without: Sequence[int] = (), labels: Sequence[int] = ()
    ) -> Found:
        """Return about the `count` rows whose embeddings have the highest cosines with a vector, float32 (D,).

        Looks into the `probes` nearest partitions. `without` are shards whose rows are not returned, and `labels` the
        numbers of labels that rows must have: fewer rows may have them in the partitions than there are. Rows that are
        there twice are returned once. Without a vector index, every row is compared.
        """
        more = count + count // 2 + 10  # the order of the quantised vectors is not that of the stored ones
        with self._errors():
            query: Any = self._table.search(np.ascontiguousarray(vector, np.float32), vector_column_name="vector")
            query = query.distance_type("cosine").limit(more).nprobes(probes)
            if condition := _make_filter(labels, without):
                # After the search, the condition would leave few of the nearest rows, or none.
                query = query.where(condition, prefilter=True)
            table = query.select(["shard", "row", "vector", "_distance"]).to_arrow().combine_chunks()
        stored = table["vector"].combine_chunks() if table.num_rows else None
        embeddings = np.zeros((0, self.width), np.float32) if stored is None else read_vectors(stored)
        pairs = np.stack([table["shard"].to_numpy().astype(np.int64), table["row"].to_numpy().astype(np.int64)])
        order = np.argsort(-(embeddings @ vector), kind="stable")
        first = np.sort(np.unique(pairs[:, order], axis=1, return_index=True)[1])
        chosen = order[first][:count]
        return Found(pairs[0, chosen], pairs[1, chosen], embeddings[chosen])

    def find_key(self, key: str, without: Sequence[int] = ()) -> list[tuple[int, int]]:
        """Return shard and row of the rows with a key. Reads all keys: 60 ms for a million on a local disk."""
        with self._errors():
            condition = " AND ".join(filter(None, [f"key = {quote_text(key)}", _make_filter((), without)]))
            found = self._table.search().where(condition).select(["shard", "row"]).limit(_SAME_KEY).to_arrow()
        return list(zip(found["shard"].to_pylist(), found["row"].to_pylist(), strict=True))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        with _errors(self._uri):
            yield


def import_lancedb() -> Any:
    """Return the module `lancedb`. Raises `ConfigError`, which says what to install, if it is not there."""
    # Its warnings about training are lines on stderr, which say nothing that the recall does not.
    os.environ.setdefault("LANCEDB_LOG", "error")
    try:
        import lancedb
    except ImportError as error:
        raise ConfigError("an index needs the package lancedb: pip install 'sightline[lancedb]'") from error
    return lancedb


def make_schema(output: TaggedOutput) -> pa.Schema:
    """Return the schema of the table. The embeddings have the numbers of the output, so that scores are the same."""
    number = pa.float16() if output.fingerprint["embedding_dtype"] == "float16" else pa.float32()
    return pa.schema(
        [
            ("shard", pa.int64()),
            ("generation", pa.int16()),
            ("row", pa.int64()),
            ("key", pa.string()),
            ("labels", pa.list_(pa.int32())),
            ("vector", pa.list_(number, output.width)),
        ]
    )


def count_partitions(rows: int) -> int:
    """Return the number of partitions of a vector index that is trained from so many rows."""
    return max(1, min(math.isqrt(rows), rows // _SQ_SAMPLE))


def quote_text(text: str) -> str:
    """Return a text as a literal of SQL. Only the quote has a meaning in it."""
    return "'" + text.replace("'", "''") + "'"


def number_shard(shard: str) -> int:
    """Return the number that stands for a shard in the table."""
    segment, number = parse_shard(shard)
    return segment * 1_000_000 + number


def name_shard(number: int) -> str:
    """Return the name of a shard from its number in the table."""
    return shard_id(*divmod(int(number), 1_000_000))


def _unique_pairs(pairs: NDArray[np.int64]) -> tuple[list[list[int]], list[int]]:
    values, counts = np.unique(pairs, axis=1, return_counts=True)
    return values.T.tolist(), counts.tolist()


def _make_filter(labels: Sequence[int], without: Sequence[int]) -> str | None:
    conditions = []
    if without:
        conditions.append(f"shard NOT IN ({_join(without)})")
    if labels:
        conditions.append(f"array_has_all(labels, [{_join(labels)}])")
    return " AND ".join(conditions) or None


def _join(shards: Sequence[int]) -> str:
    return ", ".join(str(int(shard)) for shard in shards)


@contextlib.contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Raise what LanceDB raises, errors of Rust as OSError, RuntimeError and ValueError, as a `StoreError`."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise StoreError(f"the index {uri} cannot be used: {line[:400]}") from error
