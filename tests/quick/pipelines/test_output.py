"""Commits, the manifest and verification of an output: repeated, concurrent, interrupted, damaged. Runs no Ray."""

from __future__ import annotations

import base64
import json
import pickle
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.committer import ShardTracker
from pipelines.config import JobConfig
from pipelines.inputs.columns import PassedColumns
from pipelines.output import writer
from pipelines.output.commit import commit_shard
from pipelines.output.fingerprint import check_fingerprint, claim_output, make_fingerprint, read_columns
from pipelines.output.ledger import Ledger
from pipelines.output.markers import make_marker
from pipelines.output.output import Output, owner_of
from pipelines.output.schema import OutputFormat
from pipelines.output.state import OutputState, read_state
from pipelines.output.writer import OutputWriter
from pipelines.planning.plan import ShardRef, append_inputs, list_shards, read_plan
from pipelines.stages.parts import ShardSummary, covers, encode_rows, read_parts
from pipelines.stages.sink import RECEIPT_SCHEMA
from pipelines.upkeep.retry import find_retry
from pipelines.upkeep.verify import verify_output
from siglip.checkpoint import pin_model
from storage.local import LocalStore
from storage.settings import ConfigError
from storage.store import StoreError
from tests.support.images import encode, make_rgb

FINGERPRINT = '{"a": 1}'
FORMAT = OutputFormat(2, "float32", False, pa.schema([]))


class Place:
    """An output with a plan of three shards with two images each, and helpers that write parts and commit them."""

    def __init__(self, root: Path) -> None:
        self.root = root / "output"
        self.output = Output(str(self.root))
        self.store = self.output.store
        (root / "input").mkdir()
        for number in range(6):
            (root / f"input/{number}.png").write_bytes(encode(make_rgb(9, 9, number)))
        self.config = JobConfig(input=str(root / "input"), output=str(self.root), labels=["a"], rows_per_shard=2)
        self.claim(FINGERPRINT)
        assert append_inputs(self.config, self.output, read_plan(self.output), PassedColumns({}), lambda: None)
        self.refs = list(list_shards(self.output))
        self.writer = OutputWriter(self.output, FORMAT, FINGERPRINT)
        self.runs: dict[str, list[int]] = {}

    def claim(self, text: str) -> None:
        self.store.put(str(self.root / "fingerprint.json"), text.encode())

    def part(self, ref: ShardRef, rows: list[int], rejected: tuple[int, ...] = ()) -> str:
        count = len(rows)
        reasons = ["corrupt" if row in rejected else None for row in rows]
        values = {
            "key": [str(row) for row in rows],
            "source": ["x"] * count,
            "row": rows,
            "labels": [["a"]] * count,
            "scores": [[0.5]] * count,
            "embedding": [[1.0, 0.0]] * count,
            "sha256": ["0"] * count,
            "width": [1] * count,
            "height": [1] * count,
            "reason": reasons,
        }
        schema = FORMAT.part_schema()
        columns = {f.name: pa.array(values.get(f.name, [None] * count), f.type) for f in schema}
        part = self.writer.write_part(ref.shard, pa.table(columns, schema=schema))
        self.runs[part] = encode_rows(np.array(rows))
        return part

    def commit(self, ref: ShardRef, *parts: str, rows_in: int = 2) -> dict[str, Any]:
        runs = {part: self.runs.get(part, [0, rows_in]) for part in parts}
        return commit_shard(self.writer, ref, runs, ShardSummary([0, rows_in], rows_in))

    def finish(self) -> dict[str, Any]:
        """What a run does at its end, which has done the same before as a run that was killed."""
        state = OutputState(self.output, read_plan(self.output), Ledger.read(self.output))
        state.announce({0})
        state.catch_up()
        return state.finish({}, {}, [])

    def commits(self) -> dict[str, int]:
        return dict(self.output.list_commits({0}))

    def retry(self, ref: ShardRef, generation: int = 1) -> ShardRef:
        """The next generation of a committed shard, as a run makes it."""
        read_state(self.output, read_plan(self.output))
        [found] = Ledger.read(self.output).with_files([replace(ref, generation=generation)])
        return found

    def files(self, kind: str) -> list[str]:
        return sorted(path.name for path in (self.root / kind).rglob("*") if path.is_file())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_the_advice_about_other_settings_depends_on_how_far_the_output_is(place: Place) -> None:
    """`sightline retag` needs an output that a run has finished."""
    kept = {"decode": "auto", "labels.names": ["cta"]}
    for name, other in (("labels.names", ["cat"]), ("decode", "exact")):
        with pytest.raises(ConfigError, match="no image is committed there yet: delete it if no other run") as refused:
            check_fingerprint(kept, {**kept, name: other}, place.output)
        assert "retag" not in str(refused.value)
    place.commit(place.refs[0], place.part(place.refs[0], [0, 1]))
    corrected = {**kept, "labels.names": ["cat"]}
    with pytest.raises(ConfigError, match="change them back; once a run has ended, `sightline retag` gives"):
        check_fingerprint(kept, corrected, place.output)
    with pytest.raises(ConfigError, match="change them back or give a new output"):
        check_fingerprint(kept, {**corrected, "decode": "exact"}, place.output)
    read_state(place.output, read_plan(place.output)).finish(kept, {}, [])
    with pytest.raises(ConfigError, match="new labels; or change them back"):
        check_fingerprint(kept, corrected, place.output)


def test_a_commit_done_again_is_the_same_commit(place: Place) -> None:
    [ref, *_] = place.refs
    parts = [place.part(ref, [0, 1], rejected=(1,)), place.part(ref, [1], rejected=(1,))]
    first = place.commit(ref, *parts)
    assert (first["rows_in"], first["rows_tagged"], first["rows_rejected"]) == (2, 1, 1)
    assert place.files("parts") == []
    # The task's process died after it had removed the parts: Ray runs it again.
    assert place.commit(ref, *parts) == first
    # It died between the record and the parts.
    left = place.part(ref, [0, 1])
    assert place.commit(ref, left) == first
    assert place.files("parts") == []
    assert len(place.files("data")) == len(place.files("rejects")) == 1


def test_runs_at_once_commit_once(place: Place) -> None:
    [ref, *_] = place.refs
    mine, others = [place.part(ref, [0, 1])], [place.part(ref, [0, 1])]
    records: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda parts=parts: records.append(place.commit(ref, *parts)))
        for parts in (mine, others)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert records[0] == records[1]
    assert place.files("data") == [records[0]["files"][0]["path"].removeprefix("data/")]
    assert place.files("parts") == []


def test_a_run_that_finishes_leaves_others_what_they_need(place: Place) -> None:
    one, two, three = place.refs
    place.commit(one, place.part(one, [0, 1]))
    late = place.part(one, [0, 1])  # of a run that is behind
    retried = place.part(ShardRef(f"{one.shard}.1", one.segment, one.group, 2, 0), [0])
    pending = place.part(two, [0, 1])
    make_marker("other", "run").renew([0]).write(place.output)
    manifest = place.finish()
    assert (manifest["planned_shards"], manifest["shards"]) == (3, 1)
    assert not Path(late).exists()  # its shard is committed, so no run needs the part
    assert Path(pending).exists()
    assert Path(retried).exists()  # of the next generation, perhaps under way
    assert place.commit(one, late)["shard"] == one.shard
    assert place.commit(two, pending)["rows_tagged"] == 2
    assert place.commits() == {one.shard: 0, two.shard: 0}
    with pytest.raises(StoreError):  # parts that are gone without a commit: the run must not go on as if
        place.commit(three, str(place.root / "parts" / three.shard / f"{'0' * 32}.arrow"))


def test_a_later_generation_replaces_rejects_and_keeps_the_rest(place: Place) -> None:
    [ref, *_] = place.refs
    place.commit(ref, place.part(ref, [0, 1, 2], rejected=(0, 2)), rows_in=3)
    again = place.retry(ref)
    part = place.part(ShardRef(f"{ref.shard}.1", "", 0, 0), [2, 3, 4], rejected=(4,))
    record = commit_shard(place.writer, again, {part: [2, 5]}, ShardSummary([2, 5], 5))
    assert (record["rows_in"], record["rows_tagged"], record["rows_rejected"]) == (5, 3, 2)
    assert record["labels"] == {"a": 3}
    assert record["reasons"] == {"corrupt": 2}
    assert {generation for _, generation in place.output.list_commits({0})} == {0, 1}
    assert len(place.files("rejects")) == 2
    for other in place.refs[1:]:
        place.commit(other, place.part(other, [0, 1]))
    manifest = place.finish()
    assert len(place.files("rejects")) == 1  # the earlier generation's is gone
    assert (manifest["rows_in"], manifest["generations"]) == (9, 1)
    report = verify_output(place.output)
    assert report.ok, report.problems
    part = place.part(ShardRef(f"{ref.shard}.2", "", 0, 0), [4])
    with pytest.raises(RuntimeError, match="would lose rows"):
        commit_shard(place.writer, place.retry(ref, 2), {part: [4, 5]}, ShardSummary([4, 5], 7))


@pytest.mark.parametrize("damage", ["not json", "{}", '{"shard": "000000-000000", "files": []}', ""])
@pytest.mark.parametrize("victim", ["commits/000000-000000.json", "ledger/000000.parquet"])
def test_nothing_is_removed_while_what_is_committed_cannot_be_read(place: Place, damage: str, victim: str) -> None:
    for ref in place.refs:
        place.commit(ref, place.part(ref, [0, 1], rejected=(1,)))
    if victim.startswith("ledger"):  # a commit record counts until its shard is in a ledger
        place.finish()
    (place.root / "data/notes of mine.parquet").write_bytes(b"mine")
    (place.root / "data/000000-000000-0123456789ab.parquet").write_bytes(b"left over")
    (place.root / "parts/mine").mkdir(parents=True)
    (place.root / "parts/mine/file.arrow").write_bytes(b"mine")
    whole = (place.root / victim).read_bytes()
    (place.root / victim).write_text(damage)
    before = {str(path) for path in place.root.rglob("*") if path.is_file()}
    if victim.startswith("commits"):
        report = verify_output(place.output, remove_orphans=True)
        assert not report.ok
        assert report.orphans_removed == 0
        assert any("nothing is removed" in problem for problem in report.problems)
    else:
        with pytest.raises(StoreError, match=r"ledger/000000\.parquet is damaged"):
            verify_output(place.output, remove_orphans=True)
    assert {str(path) for path in place.root.rglob("*") if path.is_file()} == before
    with pytest.raises(StoreError, match=victim):
        place.finish()
    assert {str(path) for path in place.root.rglob("*") if path.is_file() and "runs" not in str(path)} == before
    (place.root / victim).write_bytes(whole)
    report = verify_output(place.output, remove_orphans=True)
    assert report.orphans_removed == 1
    assert (place.root / "data/notes of mine.parquet").exists()
    assert (place.root / "parts/mine/file.arrow").exists()
    assert [problem for problem in report.problems if "written by no run" in problem]


def test_verify_names_commit_records_that_are_gone(place: Place) -> None:
    for ref in place.refs:
        place.commit(ref, place.part(ref, [0, 1]))
    place.finish()
    (place.root / "commits" / f"{place.refs[1].shard}.json").unlink()
    assert verify_output(place.output).problems == [f"the commit record of shard {place.refs[1].shard} is gone"]


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("data/000001-000002-0123456789ab.parquet", ("000001-000002", 0)),
        ("rejects/000001-000002.3-0123456789ab.parquet", ("000001-000002", 3)),
        (f"data/.000001-000002-0123456789ab.parquet.{'a' * 32}.tmp", ("000001-000002", 0)),
        (f"parts/000001-000002.1/{'a' * 32}.arrow", ("000001-000002", 1)),
        ("data/000001-000002-copy.parquet", None),
        ("data/sub/000001-000002-0123456789ab.parquet", None),
        ("other/000001-000002-0123456789ab.parquet", None),
        (f"parts/mine/{'a' * 32}.arrow", None),
        ("parts/000001-000002/mine.arrow", None),
    ],
)
def test_files_are_ours_by_their_whole_name(name: str, owner: tuple[str, int] | None) -> None:
    assert owner_of(name) == owner
    output = Output("s3://bucket/out")
    assert output.path_of(output.uri_of(name)) == name


def test_the_first_configuration_owns_an_output(tmp_path: Path) -> None:
    root = str(tmp_path / "out")
    output = Output(root)
    columns = pa.schema([("score", pa.float64()), ("tags", pa.list_(pa.string()))])
    model = pin_model(JobConfig(input="/i", output=root, labels=["a"]).model)
    fingerprints = {
        label: make_fingerprint(JobConfig(input="/i", output=root, labels=[label]), model, columns) for label in "ab"
    }
    text = claim_output(output, fingerprints["a"])
    with pytest.raises(ConfigError, match=r"labels\.names"):  # although nothing is planned yet
        claim_output(output, fingerprints["b"])
    assert output.read("fingerprint.json").decode() == text
    # Another version of Arrow writes the same types in other bytes: the same output, under its first text.
    newer = {**fingerprints["a"]}
    with_metadata = columns.with_metadata({"written": "by another version"})
    newer["parquet.schema"] = base64.b64encode(with_metadata.serialize()).decode()
    assert newer != fingerprints["a"]
    assert claim_output(output, newer) == text
    assert read_columns(json.loads(text)).equals(columns)
    other = make_fingerprint(JobConfig(input="/i", output=root, labels=["a"]), model, columns.remove(1))
    with pytest.raises(ConfigError, match=r"parquet\.columns"):
        claim_output(output, other)


def receipt(shard: str, rows: list[int], summary: ShardSummary | None = None) -> dict[str, Any]:
    values = {
        "shard": shard,
        "part": f"{shard}/{rows}" if rows else None,
        "rows": encode_rows(np.asarray(rows, np.int64)),
    }
    return dict.fromkeys(RECEIPT_SCHEMA.names) | values | {"summary": summary.to_json() if summary else None}


def test_a_shard_is_complete_when_its_rows_are_there() -> None:
    refs = {name: ShardRef(name, "", 0, 4) for name in ("a", "b", "c")}
    tracker = ShardTracker(dict(refs))
    assert tracker.add(receipt("a", [2, 3])) is None
    assert tracker.add(receipt("a", [], ShardSummary([0, 4], 4))) is None  # the summary came before some rows
    assert tracker.add(receipt("a", [1, 2])) is None
    assert tracker.add(receipt("a", [0])) is not None
    assert tracker.take("a") == (refs["a"], {"a/[2, 3]": [2, 4], "a/[1, 2]": [1, 3], "a/[0]": [0, 1]})
    assert tracker.add(receipt("a", [0])) is None  # a replayed task's
    assert tracker.add(receipt("b", [7, 9])) is None
    assert (
        tracker.add(receipt("b", [], ShardSummary([7, 8, 9, 10], 12))) is not None
    )  # some rows of a shard are retried
    assert tracker.add(receipt("c", [0])) is None
    summary = tracker.add(receipt("c", [], ShardSummary(wait="missing", detail="x")))
    assert summary is not None
    assert summary.wait == "missing"


@pytest.mark.parametrize(
    ("runs", "wanted", "expected"),
    [
        ([], [], True),
        ([], [0, 1], False),
        ([[0, 3], [3, 5]], [0, 5], True),
        ([[0, 3], [4, 5]], [0, 5], False),
        ([[4, 5], [0, 5]], [0, 5], True),
        ([[2, 3, 8, 9]], [2, 3, 8, 9], True),
        ([[2, 3]], [2, 3, 8, 9], False),
        ([[0, 100]], [2, 3, 8, 9], True),
    ],
)
def test_covers(runs: list[list[int]], wanted: list[int], expected: bool) -> None:
    assert covers(runs, wanted) is expected


def test_parts_that_overlap_hold_each_row_once(place: Place) -> None:
    [ref, *_] = place.refs
    for rows in (
        [[2, 3, 4], [0, 1, 2]],
        [[0, 1, 4, 5], [2, 3, 6]],
        [[0, 1, 2, 3], [1], [2, 3, 4]],
        [[3, 1], [0, 2, 3]],
    ):
        parts = {place.part(ref, some): encode_rows(np.array(some)) for some in rows}
        found = [row for table in read_parts(place.store, parts) for row in table["row"].to_pylist()]
        assert found == sorted({row for some in rows for row in some})
    assert [*read_parts(place.store, {})] == []


@pytest.mark.parametrize("spooled", [2**10, 2**26], ids=["on the disk", "in memory"])
def test_a_large_shard_is_committed_a_row_group_at_a_time(
    place: Place, spooled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SPOOLED_BYTES", spooled)
    [ref, *_] = place.refs
    rejected = tuple(range(0, 10_000, 97))
    starts = np.random.default_rng(0).permutation(np.arange(0, 10_000, 250))
    parts = [place.part(ref, list(range(start, min(start + 260, 10_000))), rejected) for start in starts.tolist()]
    most, held, read = 0, 0, place.store.read

    class Part(bytes):
        """A part's bytes, until the last row that points into them is gone."""

        def __del__(self) -> None:
            nonlocal held
            held -= 1

    class Counting(LocalStore):
        """Counts the parts that are in memory at a time."""

        def read(self, uri: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytes:
            nonlocal most, held
            data = read(uri, start, stop, etag)
            if uri not in parts:
                return data
            held += 1
            most = max(most, held)
            return Part(data)

    monkeypatch.setattr(Output, "store", Counting())
    record = place.commit(ref, *parts, rows_in=10_000)
    assert (record["rows_tagged"], record["rows_rejected"]) == (10_000 - len(rejected), len(rejected))
    assert most <= 20, f"{most} of {len(parts)} parts at a time, where a row group is 16"
    file = pq.ParquetFile(place.root / record["files"][0]["path"])
    groups = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    assert groups == [4096, 4096, 10_000 - len(rejected) - 2 * 4096]
    assert file.read(["row"])["row"].to_pylist() == [row for row in range(10_000) if row not in rejected]
    for other in place.refs[1:]:
        place.commit(other, place.part(other, [0, 1]))
    place.finish()
    assert verify_output(place.output).problems == []


def test_a_large_shard_has_several_files_each_of_bounded_row_groups(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FILE_BYTES", 1)
    monkeypatch.setattr(writer, "ROW_GROUP_BYTES", 50_000)
    [ref, *others] = place.refs
    rejected = tuple(range(1, 9_000, 2))
    parts = [place.part(ref, list(range(start, start + 100)), rejected) for start in range(0, 9_000, 100)]
    record = place.commit(ref, *parts, rows_in=9_000)
    for other in others:
        place.commit(other, place.part(other, [0, 1]))
    for kind, first in (("data", 0), ("rejects", 1)):
        paths = [file["path"] for file in record["files"] if file["path"].startswith(kind)]
        assert len(paths) > 2
        tables = []
        for path in paths:
            with pq.ParquetFile(place.root / path) as file:
                tables.append(file.read(["row"]))
                for group in range(file.num_row_groups):
                    assert file.metadata.row_group(group).num_rows < 2000
        assert pa.concat_tables(tables)["row"].to_pylist() == list(range(first, 9_000, 2))
    place.finish()
    assert verify_output(place.output).problems == []
    again = place.retry(ref)
    retry = find_retry(place.output, again, ["corrupt"])
    assert (retry.rows_in, retry.uris) == (9_000, {"x"})
    assert np.flatnonzero(retry.wanted).tolist() == list(rejected)
    assert np.flatnonzero(retry.contents == 0).tolist() == list(rejected)
    # A retry of some rejected rows, of which one is rejected again. The others stay rejected.
    part = place.part(again, [1, 3, 5], (3,))
    record = commit_shard(place.writer, again, {part: [1, 2, 3, 4, 5, 6]}, ShardSummary([1, 2, 3, 4, 5, 6], 9_000))
    assert (record["rows_tagged"], record["reasons"]) == (4_502, {"corrupt": 4_498})
    place.finish()
    assert verify_output(place.output).problems == []


def test_passed_through_columns_with_names_of_the_rejects_change_no_reject(place: Place) -> None:
    names = ("reason", "detail", "stage")
    format_ = replace(FORMAT, columns=pa.schema([(name, pa.string()) for name in names]))
    [ref, *_] = place.refs
    table = pa.ipc.open_file(place.part(ref, [0, 1, 2], (1, 2))).read_all()
    place.writer = replace(place.writer, format=format_)
    own = pa.table({f"column:{name}": ["mine", "mine", None] for name in names})
    columns = {name: own[name] if name in own.column_names else table[name] for name in format_.part_schema().names}
    part = place.writer.write_part(ref.shard, pa.table(columns))
    place.runs[part] = [0, 3]
    record = place.commit(ref, part, rows_in=3)
    assert record["reasons"] == {"corrupt": 2}
    found = {file["path"].partition("/")[0]: pq.read_table(place.root / file["path"]) for file in record["files"]}
    assert found["rejects"].select(names).to_pylist() == [dict.fromkeys(names) | {"reason": "corrupt"}] * 2
    assert found["data"].select(names).to_pylist() == [dict.fromkeys(names, "mine")]


def test_a_commit_whose_rows_are_missing_leaves_no_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FILE_BYTES", 1)
    monkeypatch.setattr(writer, "ROW_GROUP_BYTES", 1)
    [ref, *_] = place.refs
    parts = [place.part(ref, [row], (1,)) for row in (0, 1, 2)]
    with pytest.raises(RuntimeError, match="3 rows of 4"):
        place.commit(ref, *parts, rows_in=4)
    assert place.files("data") == place.files("rejects") == []


def test_a_commit_record_that_is_another_shards_is_damaged(place: Place) -> None:
    one, two, _ = place.refs
    place.commit(one, place.part(one, [0, 1]))
    commits = place.root / "commits"
    (commits / f"{two.shard}.json").write_bytes((commits / f"{one.shard}.json").read_bytes())
    with pytest.raises(StoreError, match="damaged"):
        place.output.read_commit(two.shard)


def test_an_output_is_pickled_without_its_store(place: Place) -> None:
    assert place.commits() == {}  # opens the store
    copy = pickle.loads(pickle.dumps(place.output))
    assert copy == place.output
    assert "store" not in vars(copy)
    assert list(copy.list_commits({0})) == []
