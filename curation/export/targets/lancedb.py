"""A LanceDB database with one table, `images`, whose embeddings can be searched."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from curation.export.job import Job, Target, add_vectors
from curation.tagged_output import TaggedOutput
from storage.settings import ConfigError

TABLE = "images"
_ROWS = 4096


def write(job: Job, path: str) -> None:
    """Write the database to a folder.

    The table has the columns of `Job`, `embedding` as a fixed-size list of D float32, and `image` (bytes) if the
    export has images. There is no index: make one with `table.create_index`. Memory holds a few batches of 4,096 rows,
    or of 32 with images.
    """
    import lancedb

    schema = _make_schema(job)
    failures: list[Exception] = []

    def read() -> Iterator[pa.RecordBatch]:
        try:
            yield from _make_batches(job, schema)
        except Exception as error:
            failures.append(error)
            raise

    try:
        lancedb.connect(path).create_table(TABLE, data=pa.RecordBatchReader.from_batches(schema, read()))
    except Exception:
        if failures:  # LanceDB raises an error of its own in its place
            raise failures[0] from None
        raise


def _make_schema(job: Job) -> pa.Schema:
    schema = job.make_schema()
    return schema if job.images is None else schema.append(pa.field("image", pa.binary()))


def _make_batches(job: Job, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    if job.images is None:
        for batch, vectors in job.batches(_ROWS):
            yield add_vectors(batch, vectors, schema)
        return
    for batch, vectors, pictures in job.pictures():
        columns = add_vectors(batch, vectors, job.make_schema()).columns
        images = pa.array([picture.data for picture in pictures], pa.binary())
        yield pa.RecordBatch.from_arrays([*columns, images], schema=schema)


def _prepare(output: TaggedOutput, destination: str, with_images: bool) -> list[str]:
    try:
        import lancedb  # noqa: F401
    except ImportError as error:
        raise ConfigError("--to lancedb needs the package lancedb: pip install 'sightline[lancedb]'") from error
    if with_images and "image" in output.columns:
        raise ConfigError("the output has a column named image, so the images have no place: leave out the images")
    if dotted := [name for name in output.columns if "." in name]:
        raise ConfigError(f"LanceDB takes no column name with a dot, such as {dotted[0]!r}: use --to hf")
    return []


TARGET = Target("possible", write, prepare=_prepare)
