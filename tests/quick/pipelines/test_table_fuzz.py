"""A fuzzer of Parquet files and lists: every row that an independent reader finds is a row, or the file says why not.

The same few hundred examples at each run. `SIGHTLINE_FUZZ_SECONDS` sets how long each test runs instead, with new ones;
`SIGHTLINE_FUZZ_SEED` repeats them.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import JobConfig, ParquetConfig
from pipelines.inputs import lists, parquet
from pipelines.inputs.rows import Input, ReadColumns, Reading, Row, Skipped
from storage.settings import ConfigError
from storage.store import Entry, StoreOptions

SECONDS = float(os.environ.get("SIGHTLINE_FUZZ_SECONDS", 0))
SEED = int(os.environ.get("SIGHTLINE_FUZZ_SEED", random.SystemRandom().randrange(10**6) if SECONDS else 29))
OPTIONS = StoreOptions()
MAX_BYTES = 3 << 30
"""The most that pyarrow may allocate at once: a page may claim 2 GiB, as Parquet allows."""

COLUMNS = pa.schema([("n", pa.int64()), ("s", pa.string())])
IMAGES = [bytes([65 + n]) * (n * 37 % 90 + 1) for n in range(24)]


def rounds(count: int) -> Iterator[random.Random]:
    """A generator of random numbers for each round."""
    end = time.monotonic() + SECONDS
    for number in itertools.count():
        if number >= count and time.monotonic() >= end:
            print(f"{number} rounds from seed {SEED}")
            return
        yield random.Random(SEED * 1_000_003 + number)


def make_seeds() -> list[bytes]:
    """Parquet files of many forms, with two row groups."""
    structs = [{"bytes": image, "path": f"p{n}"} for n, image in enumerate(IMAGES)]
    uris = [f"gone/{n}.jpg" for n in range(len(IMAGES))]
    plain: dict[str, Any] = {"image": IMAGES, "n": list(range(24)), "s": [str(n) for n in range(24)]}
    features = json.dumps({"info": {"features": {"x": {"_type": "Image"}, "audio": {"_type": "Audio"}}}})
    tables: list[tuple[pa.Table, dict[str, Any]]] = [
        *((pa.table(plain), {"compression": c}) for c in ("none", "snappy", "zstd", "gzip", "brotli", "lz4")),
        (pa.table(plain), {"use_dictionary": False, "write_statistics": False, "compression": "none"}),
        (pa.table(plain), {"data_page_version": "2.0", "data_page_size": 64, "compression": "none"}),
        (pa.table({"image": structs, "n": list(range(24))}), {"compression": "none"}),
        (pa.table({"x": structs, "audio": structs}).replace_schema_metadata({"huggingface": features}), {}),
        (pa.table({"image": pa.array(IMAGES).dictionary_encode()}), {"compression": "none"}),
        (pa.table({"images": [[image, None] for image in IMAGES], "n": list(range(24))}), {"compression": "none"}),
        (pa.table({"a": [{"image": image, "n": 1} for image in IMAGES]}), {"compression": "none"}),
        (pa.table({"url": uris, "n": list(range(24))}), {"compression": "none"}),
        (
            pa.table({"image": IMAGES}),
            {"column_encoding": {"image": "DELTA_BYTE_ARRAY"}, "use_dictionary": False, "compression": "none"},
        ),
        (
            pa.table({"image": IMAGES}),
            {"column_encoding": {"image": "DELTA_LENGTH_BYTE_ARRAY"}, "use_dictionary": False, "compression": "none"},
        ),
        (pa.table({"image": [i if n % 3 else None for n, i in enumerate(IMAGES)]}), {"write_page_checksum": True}),
    ]
    seeds = []
    for table, options in tables:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=13, **options)
        seeds.append(buffer.getvalue())
    return seeds


def mutate(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Change some bytes, more often in the footer and in the headers of pages than in values."""
    changed = bytearray(data)
    footer = max(0, len(data) - 8 - int.from_bytes(data[-8:-4], "little"))
    for _ in range(chance.choice([1, 1, 1, 2, 4, 16])):
        size = len(changed)
        start = chance.randrange(footer, size) if chance.random() < 0.6 and footer < size else chance.randrange(size)
        length = chance.choice([1, 1, 2, 4, 8, 40])
        match chance.randrange(6):
            case 0:
                changed[start] ^= 1 << chance.randrange(8)
            case 1:
                changed[start : start + length] = chance.randbytes(len(changed[start : start + length]))
            case 2:
                fill = chance.choice([0, 1, 0x7F, 0x80, 0xFF])
                changed[start : start + length] = bytes([fill]) * len(changed[start : start + length])
            case 3:
                del changed[start : start + length]
            case 4:
                changed[start:start] = chance.randbytes(length)
            case _:
                other = chance.choice(others)
                begin = chance.randrange(len(other))
                changed[start : start + length] = other[begin : begin + length]
        if not changed:
            changed = bytearray(b"\0")
    if (
        chance.random() < 0.8 and len(changed) > 8
    ):  # the footer's length and the magic bytes stay right, so it is parsed
        length = len(changed) - 8 - min(footer, len(changed) - 8)
        changed[-8:] = length.to_bytes(4, "little") + b"PAR1"
    return bytes(changed)


def check_refusal(path: Path, error: ConfigError) -> str:
    """The text of a refusal, which is one line that names the file."""
    text = str(error)
    assert path.name in text
    assert "\n" not in text
    return text


def read_ours(path: Path, **keys: Any) -> tuple[list[Row], str]:
    """The rows of a file as the job plans and reads it, or why it is skipped or refused."""
    config = JobConfig(input=str(path), output="/out", labels=["a"], parquet=keys, rows_per_shard=5)
    skipped, rows = Skipped(), list[Row]()
    planned = Input("parquet", str(path), path.name, path.stat().st_size, "")
    try:
        found = parquet.inspect(planned, config, OPTIONS)
        reading = Reading(OPTIONS, 1 << 20, ParquetConfig(**keys), COLUMNS)
        for part in found.parts:
            rows += parquet.read(part, reading, skipped)
    except ConfigError as error:
        return [], check_refusal(path, error)
    return rows, found.skipped


def read_theirs(path: Path, column: str) -> list[Any] | None:
    """The values of a column as pyarrow reads the whole file, or None if it does not."""
    try:
        return list(pq.read_table(path, columns=[column])[column].to_pylist())
    except Exception:
        return None


def test_no_row_of_a_mutated_parquet_file_vanishes(tmp_path: Path) -> None:
    seeds, path = make_seeds(), tmp_path / "a.parquet"
    before = pa.default_memory_pool().max_memory()
    for chance in rounds(250):
        path.write_bytes(mutate(chance.choice(seeds), seeds, chance))
        keys: dict[str, Any] = chance.choice(
            [{}, {}, {"key_column": "n"}, {"key_column": "s"}, {"columns": ["n"]}, {"columns": ["n", "s"]}]
        )
        rows, refused = read_ours(path, **keys)
        for row in rows:
            row.key.encode()
        if refused or any(row.rejected and row.rejected.reason == "corrupt_archive" for row in rows):
            continue
        values = read_theirs(path, "image")
        if values is not None:
            expected = [value["bytes"] if isinstance(value, dict) else value for value in values]
            assert len(rows) == len(expected), path.read_bytes()
            # A passed-through text that is not UTF-8 makes its row a reject.
            wrong = [n for n, row in enumerate(rows) if row.data != expected[n] and row.rejected is None]
            assert wrong == [], path.read_bytes()
        assert pa.default_memory_pool().max_memory() < before + MAX_BYTES, path.read_bytes()


CELLS = (
    *("a.jpg", "b c.jpg", "x", "", " ", "\ufeff", "1.10", '"', '""', '"x,y"', '"two\nlines"', "\u2028", "#a.jpg"),
    *("\x0b", "'", "\\", "\\n", "data:", "http://h/x.jpg", "\0", "\x85", "C:\\a.jpg", '"a"b', "null", "\xfc"),
)
ENDS = ("\n", "\n", "\n", "\r\n", "\r", "\n\n")
NAMES = ("path", "image", "url", "caption", "Path", "", "id", '"a,b"', "file_name", "path")


def make_table(chance: random.Random, separator: str) -> str:
    width = chance.randint(1, 4)
    lines = [separator.join(chance.choice(NAMES) for _ in range(width))]
    for _ in range(chance.randint(0, 12)):
        wrong = chance.random() < 0.03
        lines.append(separator.join(chance.choice(CELLS) for _ in range(width + wrong)))
    text = "".join(line + chance.choice(ENDS) for line in lines)
    if chance.random() < 0.2:
        start = chance.randrange(len(text))
        text = text[:start] + chance.choice([*CELLS, ",", ";", "\t", "\n"]) + text[start + chance.randint(0, 3) :]
    return chance.choice(["", "\ufeff"]) + text


def expand(path: Path, column: str | None = None) -> tuple[list[Input], Skipped] | str:
    """The inputs of a list, or why it is refused."""
    skipped = Skipped()
    entry = Entry(str(path), path.stat().st_size, "")
    try:
        return list(lists.expand(entry, column, OPTIONS, skipped, ReadColumns())), skipped
    except ConfigError as error:
        return check_refusal(path, error)


def read_csv(text: str, separator: str) -> list[list[str]]:
    """The rows as Python's csv reads them, without blank lines."""
    rows = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), delimiter=separator)
    return [row for row in rows if row]


def test_no_row_of_a_table_vanishes(tmp_path: Path) -> None:
    """The independent reader is Python's csv, which also takes what our reader refuses."""
    read = 0
    for chance in rounds(2000):
        separator = chance.choice(",,,;\t|")
        path = tmp_path / ("a.tsv" if separator == "\t" and chance.random() < 0.5 else "a.csv")
        text = make_table(chance, separator)
        path.write_bytes(text.encode())
        ours = expand(path)
        if isinstance(ours, str):
            continue
        inputs, skipped = ours
        found = len(inputs) + skipped.counts.total()
        assert any(
            found == len(rows) - 1 and {planned.key for planned in inputs if planned.uri} <= set(itertools.chain(*rows))
            for rows in (read_csv(text, used) for used in {separator, ","})
        ), (text, inputs)
        read += len(inputs)
    assert read > 100


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_no_line_of_a_list_vanishes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    for chance in rounds(500):
        lines = [chance.choice(CELLS) * chance.choice([1, 1, 1, 2]) for _ in range(chance.randint(0, 9))]
        if suffix == "jsonl":
            lines = [json.dumps({"path": line, "n": n}) for n, line in enumerate(lines)]
        data = b"".join(line.encode() + chance.choice(ENDS).encode() for line in lines)
        if chance.random() < 0.3 and data:
            start = chance.randrange(len(data))
            data = data[:start] + chance.randbytes(chance.randint(0, 3)) + data[start + chance.randint(0, 3) :]
        path.write_bytes(data)
        ours = expand(path)
        if isinstance(ours, str):
            continue
        inputs, skipped = ours
        text = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline=None).read()
        expected = [line for line in text.split("\n") if line.strip(" \t\r")]
        if suffix == "txt":
            keys = [line for line in expected if not line.lstrip(" \t").startswith("#")]
            assert [planned.key for planned in inputs] == keys, data
            assert skipped.counts.total() <= len(expected) - len(keys)
        else:
            assert len(inputs) == len([line for line in expected if line.strip()]), data
