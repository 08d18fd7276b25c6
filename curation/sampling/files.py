"""The files of a sample: `sample.parquet` with the questions and their thumbnails, and `sample.json`."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.sampling.design import Design
from curation.sampling.sample import Goal, Sample
from curation.tagged_output import ID, TaggedOutput
from pipelines.output.labels import read_label_table
from pipelines.output.output import LABELS, Output
from storage.settings import ConfigError
from storage.store import StoreError, join

_IMAGES_AT_ONCE, _GROUP_ROWS = 256, 64
"""Images that are read from the output at once, and questions in a row group of the sample."""
FILES = ("sample.parquet", "sample.json", LABELS)
_SCHEMA = pa.schema(
    [
        (ID, pa.string()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("sha256", pa.string()),
        ("label", pa.string()),
        ("sample", pa.string()),
        ("score", pa.float32()),
        ("stratum", pa.int64()),
        ("weight", pa.float64()),
        ("thumbnail", pa.binary()),
    ]
)


def check_folder(folder: Path) -> None:
    """Raise `ConfigError` unless the folder for a new sample is empty or does not exist."""
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and may contain answers: name a new folder")


def write_sample(
    output: TaggedOutput, sample: Sample, folder: Path, seed: int, goal: Goal, excluded: Sequence[str] = ()
) -> None:
    """Write a sample to a new folder: `sample.parquet`, with one row for each question, and its design.

    The design is `sample.json`, which has the borders between the strata, and `labels.parquet`, a copy of the output's:
    the scores that the borders refer to can be computed from it again. `excluded` are the paths of the answers that the
    sample does not ask for again; they are written to `sample.json`, and not read.

    The column `thumbnail` is null when the output has no thumbnails. Memory holds the thumbnails of one row group of
    the output; those of the sample are kept in a temporary file until they are written in the order of the questions.
    Raises `ConfigError` when the folder is not empty or cannot be written.
    """
    check_folder(folder)
    design = sample.design
    metadata = {
        "sample": design.sample,
        "output": output.uri,
        "images": output.rows,
        "labels.digest": output.fingerprint["labels.digest"],
        "seed": seed,
        "for": goal.purpose if goal.purpose != "precision" else f"precision={goal.target:g}",
        **({"excluded": list(excluded)} if excluded else {}),
        "rows": len(sample.position),
        "strata": {
            name: {"from scores": edges.tolist(), "images": sample.population[name], "drawn": sample.drawn[name]}
            for name, edges in design.edges.items()
        },
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as thumbnails:
            _write_questions(output, sample, folder / FILES[0], thumbnails)
        (folder / FILES[2]).write_bytes(output.store.read(join(output.uri, LABELS)))
        (folder / FILES[1]).write_text(json.dumps(metadata, indent=1, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from error


def read_design(folder: Path) -> Design:
    """Read the design of the sample in a folder. Raises `ConfigError`."""
    try:
        about = json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
        table = read_label_table(Output(str(folder.resolve())))
        edges = {name: np.asarray(one["from scores"], np.float32) for name, one in about["strata"].items()}
        names = tuple(table.labels.label_names())
        return Design(str(about["sample"]), int(about["images"]), edges, names, table.head, table.weights)
    except (OSError, ValueError, LookupError, TypeError, StoreError) as error:
        raise ConfigError(f"{folder} does not hold the design of a sample: {error}: draw the sample again") from error


def read_sample(folder: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Read the questions, without their thumbnails, and the metadata that `write_sample` wrote.

    Raises `ConfigError` when they cannot be read.
    """
    _check_files(folder)
    try:
        with pq.ParquetFile(folder / FILES[0]) as file:
            table = file.read([name for name in file.schema_arrow.names if name != "thumbnail"])
        return table, json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError(f"{folder} does not hold a sample of `sightline sample`: {error}") from error


def read_questions(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the questions of a sample with their thumbnails, a row group at a time. Raises as `read_sample` does."""
    _check_files(folder)
    try:
        with pq.ParquetFile(folder / FILES[0]) as file:
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{folder} does not hold a sample of `sightline sample`: {error}") from error


def _check_files(folder: Path) -> None:
    """Raise `ConfigError` unless the files with the questions and the design are in the folder."""
    if not folder.exists():
        raise ConfigError(f"{folder} does not exist: give a folder that `sightline sample` wrote")
    for name in FILES[:2]:
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} does not hold a sample of `sightline sample`: it has no file {name}")


def is_audit(folder: Path) -> bool:
    """Whether a path is the folder of a sample that was drawn for an audit. False for a path that cannot be read."""
    try:
        about = json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and about.get("for") == "audit"


class Thumbnails:
    """The thumbnails of a sample, read from its file when they are asked for. Threads may share it."""

    def __init__(self, folder: Path) -> None:
        self._file = pq.ParquetFile(folder / FILES[0])
        groups = [self._file.metadata.row_group(group) for group in range(self._file.num_row_groups)]
        self._ends = np.cumsum([group.num_rows for group in groups])
        self._lock = threading.Lock()
        self._group, self._values = -1, pa.nulls(0, pa.binary())

    def __len__(self) -> int:
        """The number of questions."""
        return int(self._file.metadata.num_rows)

    def read(self, row: int) -> bytes | None:
        """Return the thumbnail of a question, a JPEG, or None if there is none. Keeps the last row group in memory."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        with self._lock:
            if group != self._group:
                self._values = self._file.read_row_group(group, columns=["thumbnail"])["thumbnail"].combine_chunks()
                self._group = group
            value: bytes | None = self._values[row - int(self._ends[group]) + len(self._values)].as_py()
            return value


def _write_questions(output: TaggedOutput, sample: Sample, path: Path, thumbnails: IO[bytes]) -> None:
    """Write `sample.parquet`: first collect the images in the order of the output, then write the questions."""
    kept = [name for name in ("key", "source", "sha256", "thumbnail") if name in output.columns]
    distinct, where = np.unique(sample.position, return_inverse=True)
    images: list[pa.Table] = []
    ends = [0]
    for start in range(0, len(distinct), _IMAGES_AT_ONCE):
        rows = output.take(distinct[start : start + _IMAGES_AT_ONCE], [ID, *kept])
        for thumbnail in rows["thumbnail"] if "thumbnail" in kept else []:
            thumbnails.write(thumbnail.as_py() or b"")
            ends.append(thumbnails.tell())
        images.append(rows.select([ID, "key", "source", "sha256"]))
    names = pa.array(output.labels.label_names(), pa.string())
    rows = pa.concat_tables(images) if images else pa.table({name: [] for name in (ID, "key", "source", "sha256")})
    with pq.ParquetWriter(path, _SCHEMA, compression="zstd", use_dictionary=["source", "label"]) as writer:
        for start in range(0, max(1, len(where)), _GROUP_ROWS):
            part = slice(start, start + _GROUP_ROWS)
            found = rows.take(pa.array(where[part]))
            pictures: list[bytes | None] = [None] * found.num_rows
            for index, image in enumerate(where[part] if "thumbnail" in kept else []):
                thumbnails.seek(ends[image])
                pictures[index] = thumbnails.read(ends[image + 1] - ends[image]) or None
            columns = {
                **{name: found[name] for name in (ID, "key", "source", "sha256")},
                "label": names.take(pa.array(sample.label[part])),
                "sample": pa.array([sample.design.sample] * found.num_rows, pa.string()),
                "score": sample.score[part],
                "stratum": sample.stratum[part],
                "weight": sample.weight[part],
                "thumbnail": pa.array(pictures, pa.binary()),
            }
            writer.write_table(pa.table(columns).cast(_SCHEMA))
