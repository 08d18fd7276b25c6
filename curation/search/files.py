"""Files of search results."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from curation.search.search import Results
from curation.tagged_output import ID, TaggedOutput
from storage.settings import ConfigError

SUFFIXES = (".csv", ".jsonl", ".parquet", ".txt")


def check_target(output: TaggedOutput, target: Path) -> None:
    """Raise `ConfigError` if results cannot be written to `target`: see `write_results`."""
    parent = target.absolute().parent
    if target.suffix in SUFFIXES:
        if not parent.is_dir():
            raise ConfigError(f"--to {target}: there is no folder {parent}")
        if target.is_dir():
            raise ConfigError(f"--to {target}: it is a folder: name a file")
        _check_writable(target, parent)
        return
    if target.suffix and not target.is_dir():
        raise ConfigError(f"--to {target}: give a folder, or a file that ends with {', '.join(SUFFIXES)}")
    if "thumbnail" not in output.columns:
        raise ConfigError(f"--to {target}: {output.uri} has no thumbnails for a folder: give a file, such as found.csv")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--to {target}: it is not an empty folder: give another one")
    _check_writable(target, next(one for one in (target.absolute(), *target.absolute().parents) if one.is_dir()))


def _check_writable(target: Path, folder: Path) -> None:
    """Raise `ConfigError` if no file can be made in `folder`."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"--to {target}: {folder} cannot be written to: {error.strerror or error}") from error


def write_results(results: Results, output: TaggedOutput, target: Path) -> None:
    """Write results to a file, by its suffix, or to a new or empty folder.

    A `.txt` file has the ids, one a line; `.csv`, `.jsonl` and `.parquet` files have all columns, in a CSV file lists
    as JSON. A folder gets the thumbnails, named by rank, and `results.jsonl`. Call `check_target` before the search.
    """
    table = results.table
    if target.suffix == ".parquet":
        pq.write_table(table, target)
    elif target.suffix == ".txt":
        target.write_text("".join(f"{id_}\n" for id_ in table[ID].to_pylist()))
    elif target.suffix == ".jsonl":
        _write_lines(table, target)
    elif target.suffix == ".csv":
        with target.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(table.column_names)
            for row in table.to_pylist():
                values = row.values()
                writer.writerow(
                    [json.dumps(one, ensure_ascii=False) if isinstance(one, list) else one for one in values]
                )
    else:
        target.mkdir(parents=True, exist_ok=True)
        images = output.take(results.positions, ["thumbnail"])["thumbnail"].to_pylist()
        digits = len(str(table.num_rows))
        for row, image in zip(table.to_pylist(), images, strict=True):
            (target / f"{row['rank']:0{digits}}.jpg").write_bytes(image)
        _write_lines(table, target / "results.jsonl")


def _write_lines(table: pa.Table, path: Path) -> None:
    with path.open("w") as file:
        for row in table.to_pylist():
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
