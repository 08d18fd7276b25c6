"""An output of an earlier version, from before ledgers, with its inputs: `earlier_output.tar.gz`.

That version wrote it with the model `tiny` and the labels `LABELS`, three images a shard, from inputs in `PHOTOS`. Its
plan has a row group for each shard and no column for the image column, its commit records have all files, and its
manifest too. Four shards have 12 images, of which one in `b.tar` is rejected. Beside it are its inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.local import LocalStore

ARCHIVE = Path(__file__).with_suffix(".tar.gz")
PHOTOS = "/srv/photos"
LABELS = ["red circle", "blue square", "green star"]
SHARDS, ROWS, REJECTED = 4, 12, 1


def unpack(folder: Path) -> Path:
    """Unpack the output and its inputs as they were, and return the folder of the output."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "tagged"


def unpack_here(folder: Path) -> Path:
    """Unpack the output as if its inputs had always been in `folder`, so that a job can go on with them."""
    root, photos = unpack(folder), folder / "photos"
    store = LocalStore()
    etags = {entry.uri: entry.etag for entry in store.list(str(photos))}
    plan = root / "plan/000000.parquet"
    _rewrite(plan, {"uri": lambda uri: _move(uri, photos)})
    with pq.ParquetFile(plan) as file:
        uris = file.read(["uri"])["uri"].to_pylist()
    _rewrite(plan, {"etag": iter([etags[uri] for uri in uris])})
    files = {}
    for path in [*root.glob("data/*"), *root.glob("rejects/*")]:
        _rewrite(path, {"source": lambda uri: _move(uri, photos)})
        entry = store.stat(str(path))
        assert entry is not None
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files[str(path.relative_to(root))] = {"bytes": entry.size, "etag": entry.etag, "sha256": digest}
    for path in [root / "manifest.json", *root.glob("commits/*")]:
        record = json.loads(path.read_text())
        for one in record["files"]:
            one.update(files[one["path"]])
        path.write_text(json.dumps(record))
    return root


def _move(uri: str, photos: Path) -> str:
    return os.fspath(photos) + uri.removeprefix(PHOTOS)


def _rewrite(path: Path, change: dict[str, Any]) -> None:
    """Change the values of columns: by a function, or to the next ones of an iterator. Row groups stay."""
    with pq.ParquetFile(path) as file:
        groups = [file.read_row_group(number) for number in range(file.num_row_groups)]
        schema = file.schema_arrow
    with pq.ParquetWriter(path, schema) as writer:
        for group in groups:
            columns = {name: group[name] for name in schema.names}
            for name, by in change.items():
                values = group[name].to_pylist()
                columns[name] = pa.array([by(value) if callable(by) else next(by) for value in values], pa.string())
            writer.write_table(pa.table(columns, schema=schema), row_group_size=max(1, len(group)))
