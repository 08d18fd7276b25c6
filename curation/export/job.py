"""An export that is under way: what its target reads, and what it counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa

from curation.export.images import Images, NoFile, Picture
from curation.export.selection import Selection
from curation.tagged_output import ID, INPUT_ID, TaggedOutput, read_embeddings
from siglip.scoring import Floats
from storage.store import StoreError, show

EMBEDDING, THUMBNAIL = "embedding", "thumbnail"
_NAMED = 10


@dataclass(frozen=True)
class Target:
    """A format that an export writes. Its module in `curation.export.targets` has `TARGET`.

    `write(job, path)` writes the export: to an empty folder, or with `folder` false to a file. `images` says whether it
    needs image files, can hold them (which it does if `--images` or `--thumbnails` is given), or has no place for them.
    `prepare(output, destination, with_images)` is called before any row is read: it raises `ConfigError` for what is
    wrong, and returns what a user should know. `remote(destination)` says whether the destination is a server, and then
    `write` gets it as its path.
    """

    images: Literal["needed", "possible", "none"]
    write: Callable[[Job, str], None]
    folder: bool = True
    prepare: Callable[[TaggedOutput, str, bool], list[str]] = lambda output, destination, with_images: []
    remote: Callable[[str], bool] = lambda destination: False


class Progress(Protocol):
    """Is told how far an export is."""

    def update(self, rows: int) -> None:
        """Show the number of images that were exported until now."""


@dataclass
class Job:
    """What a target reads: the rows of an output that are exported, in the output's order, with their images.

    The columns that are handed on are `id` (unique within the output), and all columns of `data/` except `embedding`
    and `thumbnail`. A passed-through column with the name `id` is called `input_id`. Embeddings are
    float32 (N, D) of unit norm, whatever the output stores.
    """

    output: TaggedOutput
    selection: Selection
    images: Images | None
    progress: Progress | None = None
    exported: int = 0
    without_file: int = 0
    missing: list[str] = field(default_factory=list)
    """The first images without a file, each with the reason."""
    notices: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """The names of the columns that are handed on, without `embedding`."""
        return list_columns(self.output)

    def make_schema(self) -> pa.Schema:
        """Return the schema of the columns that are handed on, with `embedding` as float32 at the end."""
        stored = self.output.format.data_schema()
        fields = [
            stored.field(ID).with_name(name) if name == INPUT_ID else stored.field(name) for name in self.columns[1:]
        ]
        vector = pa.field(EMBEDDING, pa.list_(pa.float32(), self.output.width))
        return pa.schema([pa.field(ID, pa.string(), nullable=False), *fields, vector])

    def rows(self, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
        """Yield some columns of the rows, in batches of at most `rows`."""
        for batch in self.selection.batches(columns, rows):
            self._count(len(batch))
            yield batch

    def batches(self, rows: int) -> Iterator[tuple[pa.RecordBatch, Floats]]:
        """Yield the rows with their embeddings, in batches of at most `rows`. The embeddings are no column of them."""
        for batch in self.selection.batches([*self.columns, EMBEDDING], rows):
            vectors = self._read_vectors(batch)
            self._count(len(batch))
            yield batch.select(self.columns), vectors

    def pictures(self) -> Iterator[tuple[pa.RecordBatch, Floats, list[Picture]]]:
        """Yield the rows that have a file, with their embeddings and files, in batches of some rows: see `Images.read`.

        Rows without a file are counted in `without_file`, and the first of them are named in `missing`.
        """
        assert self.images is not None
        names = list(dict.fromkeys([*self.columns, EMBEDDING, *self.images.columns]))
        for large in self.selection.batches(names, 1024):
            first = 0
            for found in self.images.read(large):
                batch = large.slice(first, len(found))
                first += len(found)
                self._name_missing(batch, found)
                there = [isinstance(one, Picture) for one in found]
                if not any(there):
                    continue
                batch = batch.filter(pa.array(there))
                vectors = self._read_vectors(batch)
                self._count(len(batch))
                yield batch.select(self.columns), vectors, [one for one in found if isinstance(one, Picture)]

    def _name_missing(self, batch: pa.RecordBatch, found: list[Picture | NoFile]) -> None:
        for row, one in enumerate(found):
            if isinstance(one, NoFile):
                self.without_file += 1
                if len(self.missing) < _NAMED:
                    self.missing.append(f"{show(batch['key'][row].as_py())} ({one})")

    def _read_vectors(self, batch: pa.RecordBatch) -> Floats:
        vectors = read_embeddings(batch)
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            row = batch[ID][int(np.flatnonzero(~finite)[0])].as_py()
            raise StoreError(f"{self.output.uri}: the embedding of {row} is not finite: the output is damaged")
        return vectors

    def _count(self, rows: int) -> None:
        self.exported += rows
        if self.progress is not None:
            self.progress.update(self.exported)


def list_columns(output: TaggedOutput) -> list[str]:
    """Return the names of an output's columns that are handed on, without `embedding`."""
    names = [INPUT_ID if name == ID else name for name in output.columns]
    return [ID, *(name for name in names if name not in (EMBEDDING, THUMBNAIL))]


def add_vectors(batch: pa.RecordBatch, vectors: Floats, schema: pa.Schema) -> pa.RecordBatch:
    """Add embeddings to a batch of `Job` as the column `embedding`, a fixed-size list of float32."""
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return pa.RecordBatch.from_arrays([*batch.columns, column], schema=schema)
