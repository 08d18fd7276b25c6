"""Retries of rejected rows when an input is read in another way than before. No image is doubled or lost. No Ray."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.inputs import formats
from pipelines.inputs.rows import Input, Reading, Row, Skipped
from pipelines.output.commit import commit_shard
from pipelines.output.ledger import Ledger
from pipelines.output.output import Output
from pipelines.output.row_files import read_rows
from pipelines.output.schema import OutputFormat
from pipelines.output.state import read_state
from pipelines.output.writer import OutputWriter
from pipelines.planning.plan import ShardRef, list_shards, read_plan, read_shard_inputs
from pipelines.stages.parts import ShardSummary, encode_rows
from pipelines.upkeep import retry as retry_module
from pipelines.upkeep.retry import STAY, STAY_CHANGED, Retry, _Aligner, _digest, find_retry, read_retried
from pipelines.upkeep.verify import verify_output
from siglip.images.decode import ImageRejected
from storage.store import Changed
from tests.support.input_folder import OPTIONS, Folder
from tests.support.tars import make_tar

FORMAT = OutputFormat(2, "float32", False, pa.schema([]))
FINGERPRINT = '{"a": 1}'

Found = list[tuple[str, str]]
"""What a reading of the archive gives: keys, each with the image's bytes, or `!` and the reason of a reject row."""


class Shard:
    """A shard of one tar, `a.tar`, whose readings the test chooses, and its generations of commits."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = Folder(root)
        self.folder.write("a.tar", make_tar([("0.jpg", b"x")]))
        self.folder.plan()
        self.output = Output(str(self.folder.output))
        self.output.store.put(f"{self.output.uri}/fingerprint.json", FINGERPRINT.encode())
        [self.ref] = list_shards(self.output)
        self.writer = OutputWriter(self.output, FORMAT, FINGERPRINT)
        self.found: Found = []
        self.members: dict[str, int] = {}
        self.record: dict[str, Any] = {}
        monkeypatch.setattr(retry_module, "read_inputs", self.read_inputs)

    def read_inputs(self, planned: list[Input], reading: Reading, skipped: Skipped) -> Any:
        assert formats.ARCHIVES.keys() >= {item.kind for item in planned}
        for item in planned:
            skipped.counts.update(self.members)
            for key, value in self.found:
                row = Row(key, item.uri)
                if value.startswith("!"):
                    row.rejected = ImageRejected(value[1:])
                else:
                    row.data = value.encode()
                yield item, row

    def commit(self, ref: ShardRef, rows: list[tuple[int, Row]], rows_in: int, skipped: Skipped) -> Counter[str]:
        """Commit rows. An image that begins with `bad` is rejected as corrupt. Returns the counts of the rows."""
        rows.sort(key=lambda pair: pair[0])
        numbers = [number for number, _ in rows]
        reasons = [
            row.rejected.reason if row.rejected else "corrupt" if (row.data or b"").startswith(b"bad") else None
            for _, row in rows
        ]
        values: dict[str, Any] = {
            "key": [row.key for _, row in rows],
            "source": [row.source for _, row in rows],
            "row": numbers,
            "labels": [["a"]] * len(rows),
            "scores": [[0.5]] * len(rows),
            "embedding": [[1.0, 0.0]] * len(rows),
            "sha256": [hashlib.sha256(row.data or b"").hexdigest() for _, row in rows],
            "width": [1] * len(rows),
            "height": [1] * len(rows),
            "reason": reasons,
        }
        schema = FORMAT.part_schema()
        columns = {f.name: pa.array(values.get(f.name, [None] * len(rows)), f.type) for f in schema}
        runs = encode_rows(np.array(numbers, np.int64))
        parts = {}
        if rows:
            parts[self.writer.write_part(ref.name, pa.table(columns, schema=schema))] = runs
        self.record = commit_shard(self.writer, ref, parts, ShardSummary(runs, rows_in, dict(skipped.counts)))
        state = read_state(self.output, read_plan(self.output))
        state.add(self.record)
        state.finish({}, {}, [])
        assert verify_output(self.output).problems == []
        return self.rows()

    def first(self, found: Found) -> Counter[str]:
        self.found = found
        inputs = list(read_shard_inputs(self.output, self.ref))
        skipped = Skipped()
        reading = Reading(OPTIONS, 2**20, self.folder.config().parquet)
        rows = [(number, row) for number, (_, row) in enumerate(self.read_inputs(inputs, reading, skipped))]
        return self.commit(self.ref, rows, len(rows), skipped)

    def again(self, found: Found, *reasons: str) -> Counter[str]:
        """Retry with another reading."""
        self.found = found
        refs = [replace(self.ref, generation=self.ref.generation + 1)]
        [self.ref] = Ledger.read(self.output).with_files(refs)
        retry, skipped = find_retry(self.output, self.ref, reasons), Skipped()
        inputs = list(read_shard_inputs(self.output, self.ref))
        reading = Reading(OPTIONS, 2**20, self.folder.config().parquet)
        rows = list(read_retried(inputs, retry, reading, skipped))
        return self.commit(self.ref, rows, retry.rows_in, skipped)

    def rows(self) -> Counter[str]:
        """Count the rows: the key, and for a tagged one the beginning of its image's digest, else the reason."""
        found: Counter[str] = Counter()
        for file in Ledger.read(self.output).find_files([self.ref.shard])[self.ref.shard]:
            value = "reason" if file.kind == "rejects" else "sha256"
            for batch in read_rows(self.output, file, ["key", value]):
                found.update(f"{row['key']}={row[value][:18]}" for row in batch.to_pylist())
        return found


def expect(*found: tuple[str, str]) -> Counter[str]:
    shown = ((key, v[1:] if v[:1] == "!" else "corrupt" if v[:3] == "bad" else None, v) for key, v in found)
    return Counter(f"{key}={reason or hashlib.sha256(v.encode()).hexdigest()[:18]}" for key, reason, v in shown)


@pytest.fixture
def shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shard:
    return Shard(tmp_path, monkeypatch)


A, B, C, D = ("a", "A"), ("b", "B"), ("c", "C"), ("d", "D")
BROKEN = ("a.tar", "!truncated_archive")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([("a", "!too_many_bytes"), C, D], [A, B, C, D]),
        ([("c", "bad"), D], [A, B, C, D]),
        ([A, ("d", "bad")], [A, B, C, D]),
        ([A, ("d", "bad")], [("d", "D"), B, A]),
        ([A, ("b", "bad"), BROKEN], [A, C, B, BROKEN]),
        ([A, BROKEN], [A, B, C]),
        ([A, BROKEN], [A, B, C, BROKEN]),
        ([("a.tar", "!missing")], [A, B, C]),
        ([("a.tar", "!missing")], [A, BROKEN]),
        ([("x", "X"), ("y", "bad")], [("x.png", "X"), ("x.heic", "Z"), ("y", "Y")]),  # a sample with one more image
        ([("x", "bad"), ("y", "Y")], [("x.png", "bad"), ("x.heic", "Z"), ("y", "Y")]),
        ([("x", "X"), ("x", "bad"), ("x", "Z")], [("x", "X"), ("x", "Y"), ("x", "Z")]),  # one key several times
        ([("x", "bad"), ("x", "Z")], [("x", "Z"), ("x", "Z")]),
        ([("x", "bad"), ("y", "S"), ("z", "S")], [("x", "S"), ("w", "W"), ("y", "S"), ("z", "S")]),
    ],
)
def test_a_retry_gives_each_image_that_is_read_now_once(shard: Shard, before: Found, after: Found) -> None:
    shard.first(before)
    rows = shard.again(after)
    expected = expect(*after)
    # A tagged row keeps its key when a newer reading names the image in another way.
    if ("x", "X") in before and ("x.png", "X") in after:
        expected = expect(("x", "X"), *after[1:])
    assert rows == expected
    assert STAY not in shard.record["skipped"]
    assert shard.again(after) == expected


@pytest.mark.parametrize(
    ("before", "after", "stay"),
    [
        ([A, BROKEN], [A], 1),  # it is whole, and no image was missing
        ([A, ("b", "bad")], [("a.tar", "!missing")], 1),
        ([A, ("b", "bad")], [A], 1),
        ([A, ("b", "bad"), ("c", "!unreadable")], [A, C], 1),
    ],
)
def test_rejected_rows_that_are_not_found_again_stay_and_are_counted(
    shard: Shard, before: Found, after: Found, stay: int
) -> None:
    shard.first(before)
    expected = expect(*before)
    if C in after:
        expected = expect(A, ("b", "bad"), C)
    assert shard.again(after) == expected
    assert shard.record["skipped"] == {STAY: stay}
    assert shard.again(after) == expected
    assert shard.record["skipped"] == {STAY: stay}


@pytest.mark.parametrize(
    ("before", "read", "stay"),
    [
        ([("a.tar", "!changed")], [], 1),
        ([("a.tar", "!missing")], [], 1),
        ([A, ("b", "bad"), BROKEN], [], 2),
        ([A, ("b", "bad"), ("c", "!unreadable")], [A, ("b", "B")], 1),  # it changes while it is read
    ],
)
def test_rejected_rows_of_an_input_that_has_changed_stay_and_are_counted(
    shard: Shard, before: Found, read: Found, stay: int
) -> None:
    """The planned version cannot come back, so that a retry that waits for it would wait each night."""
    shard.first(before)
    for _ in range(2):
        shard.again([*read, ("a.tar", "!changed")])
        assert shard.rows() == expect(*{**dict(before), **dict(read)}.items())
        assert shard.record["skipped"] == {STAY_CHANGED: stay}


def test_a_retry_does_not_wait_for_a_version_that_is_gone(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    path = folder.write("a.jpg", b"x")
    folder.plan()
    path.write_bytes(b"another version")
    [ref] = list_shards(output := Output(str(folder.output)))
    inputs, reading = read_shard_inputs(output, ref), Reading(OPTIONS, 2**20, folder.config().parquet)
    with pytest.raises(Changed):
        list(formats.read_inputs(inputs, reading, Skipped()))
    source, key = _digest(inputs[0].uri), _digest(inputs[0].uri, "a.jpg")
    sources, keys, contents = (np.array([value], np.uint64) for value in (source, key, 0))
    retry, skipped = Retry(keys, sources, contents, np.array([True]), {inputs[0].uri}, 1, {}), Skipped()
    assert list(read_retried(inputs, retry, reading, skipped)) == []
    assert +skipped.counts == {STAY_CHANGED: 1}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([A, ("b", "bad")], [("n", "N"), ("b", "B")]),  # another image instead of one that was tagged
        ([("0", "A"), ("1", "!too_many_bytes"), ("2", "C")], [("1", "A"), ("2", "B"), ("3", "C")]),  # keys shifted
        ([("x", "bad"), ("x", "Z")], [("x", "Z")]),  # the tagged one, which would be tagged twice
        ([("x", "bad"), ("z", "S")], [("x", "Y"), ("w", "S"), ("z", "S")]),
        ([("x", "bad"), ("z", "S")], [("x", "S")]),
    ],
)
def test_a_reading_that_may_double_an_image_leaves_the_shard_as_it_is(
    shard: Shard, before: Found, after: Found
) -> None:
    expected = shard.first(before)
    with pytest.raises(Changed, match=r"a\.tar is read in another way than before"):
        shard.again(after)
    assert shard.rows() == expected


def test_only_rows_with_the_given_reasons_are_read_again(shard: Shard) -> None:
    shard.first([A, ("b", "bad"), ("c", "!unreadable"), BROKEN])
    assert shard.again([D, A, B, C], "unreadable") == expect(D, A, ("b", "bad"), C, BROKEN)
    assert shard.again([D, A, B, C], "corrupt") == expect(D, A, B, C, BROKEN)


def test_many_rows_with_one_key_are_matched_in_order(shard: Shard) -> None:
    shard.first([("k", "bad" if n % 2 else f"{n}") for n in range(5000)])
    assert shard.again([("k", f"{n}") for n in range(5000)]) == expect(*[("k", f"{n}") for n in range(5000)])


def test_members_that_are_images_now_are_not_counted_as_skipped(shard: Shard) -> None:
    shard.members = {".heic files": 1, ".mp4 files": 2}
    shard.first([A, ("b", "bad")])
    assert shard.record["skipped"] == {".heic files": 1, ".mp4 files": 2}
    shard.members = {".mp4 files": 2}
    shard.again([A, ("b", "bad"), C])
    assert shard.record["skipped"] == {".mp4 files": 2}
    shard.members = {}
    shard.again([("a.tar", "!changed")])
    assert shard.record["skipped"] == {".mp4 files": 2, STAY_CHANGED: 1}


values = st.sampled_from(["A", "B", "C", "bad1", "!unreadable"])
readings = st.lists(st.tuples(st.sampled_from("klmn"), values) | st.just(BROKEN), max_size=7)


@settings(max_examples=200, deadline=None)
@given(readings, readings)
def test_no_image_is_doubled_or_lost_whatever_is_read(before: Found, after: Found) -> None:
    """Each image that is read is tagged as often as it is read, or as it was; else the shard waits."""
    keys = np.array([_digest("s", key) for key, _ in before], np.uint64)
    tagged = [value if value in "ABC" else "" for _, value in before]
    contents = [_digest("s", hashlib.sha256(v.encode()).hexdigest()) if v else 0 for v in tagged]
    wanted = np.array([not v for v in tagged], np.bool_)
    sources = np.full(len(before), _digest("s"), np.uint64)
    retry = Retry(keys, sources, np.array(contents, np.uint64), wanted, {"s"}, len(before), {})
    item = Input("tar", "s", "a.tar", 1, "")
    aligner = _Aligner(retry)
    rows = [Row(k, "s", rejected=ImageRejected(v[1:])) if v[0] == "!" else Row(k, "s", v.encode()) for k, v in after]
    retried: list[tuple[int, Row]] = []
    try:
        for row in rows:
            number = aligner.number(item, row)
            if number is not None:
                retried.append((number, row))
        aligner.check()
    except Changed:
        return
    numbers = [number for number, _ in retried]
    assert len(set(numbers)) == len(numbers)
    assert all(number >= len(before) or retry.wanted[number] for number in numbers)
    assert sorted(number for number in numbers if number >= len(before)) == list(range(len(before), retry.rows_in))
    was, read = Counter(v for v in tagged if v), Counter(value for _, value in after if value in "ABC")
    now = was + Counter(row.data.decode() for _, row in retried if row.data and row.data in (b"A", b"B", b"C"))
    assert now == was | read
