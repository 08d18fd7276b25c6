"""Delta tables of outputs: every row once, whatever runs, fails or is killed, and as its readers read it.

The reports of others' trouble that a test's docstring names are issues of public repositories.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, Transaction
from typer.testing import CliRunner

from benchmarks.outputs import SyntheticOutput
from curation.tagged_output import open_output
from pipelines.output.output import TABLES, Output, merged_at
from pipelines.output.state import OutputState
from pipelines.tables import delta
from pipelines.tables.changes import list_files
from pipelines.tables.columns import choose_columns, convert_type
from pipelines.tables.publication import Publication, check_table, publish_output, read_tables
from pipelines.upkeep import compaction, verify
from pipelines.upkeep.compaction import compact_output
from pipelines.upkeep.verify import verify_output
from sightline import api
from sightline.cli import app
from storage.settings import ConfigError
from storage.store import StoreError
from tests.support.growing_output import LABELS, WIDTH, GrowingOutput
from tests.support.table_writer import kill_writers
from tests.support.vectors import draw_vectors

SILENT: Any = SimpleNamespace(say=lambda line: None)


@pytest.fixture
def growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GrowingOutput:
    monkeypatch.setattr(compaction, "LEAST_FILES", 3)
    return GrowingOutput(tmp_path / "tags")


def open_table(growing: GrowingOutput, kind: str = "data") -> DeltaTable:
    return DeltaTable(str(growing.root / kind))


def read_keys(growing: GrowingOutput, kind: str = "data") -> list[str]:
    keys: list[str] = open_table(growing, kind).to_pyarrow_table(columns=["key"])["key"].to_pylist()
    return sorted(keys)


def read_log(growing: GrowingOutput, version: int, kind: str = "data") -> list[dict[str, Any]]:
    """The actions of one version."""
    text = (growing.root / kind / "_delta_log" / f"{version:020d}.json").read_text()
    return [json.loads(line) for line in text.splitlines()]


def check(growing: GrowingOutput) -> None:
    """The tables have the rows that the ledgers have, and the output is whole."""
    output = open_output(str(growing.root))
    for kind, batches in (("data", output.batches(["key"])), ("rejects", output.rejects(["key"]))):
        assert read_keys(growing, kind) == sorted(key for batch in batches for key in batch["key"].to_pylist()), kind
        assert {os.path.basename(uri) for uri in open_table(growing, kind).file_uris()} == {
            path.name for path in (growing.root / kind).glob("*.parquet")
        }
    growing.check()


def test_a_night_is_one_transaction_and_appears_at_once(growing: GrowingOutput) -> None:
    publication = Publication("delta")
    growing.grow(3, 5, rejected=[1], publish=publication)
    assert publication.lines == ["the Delta table is up to date: 12 images; files: 6 added, 0 removed"]
    check(growing)
    version = open_table(growing).version()
    growing.grow(2, 5, rejected=[1], publish=Publication())
    check(growing)
    assert open_table(growing).version() == version + 1
    noted = [one["txn"] for one in read_log(growing, version + 1)[-2:]]
    assert noted[0] == {"appId": "sightline", "version": 2}
    assert noted[1] == {"appId": "sightline-ledgers", "version": int(growing.run().state.ledger.marks[2], 16)}
    growing.grow(2, 5, publish=Publication())  # without a rejected row
    check(growing)
    assert open_table(growing, "rejects").transaction_version("sightline") == 3


def test_an_output_without_a_table_stays_as_it_is(growing: GrowingOutput) -> None:
    publication = Publication()
    growing.grow(2, 3, rejected=[0], publish=publication)
    compact_output(growing.output, SILENT)
    assert (publication.lines, publication.failure) == ([], "")
    assert not (growing.root / TABLES).exists()
    assert not [*growing.root.rglob("_delta_log")]


def test_what_is_published_is_not_published_again(growing: GrowingOutput) -> None:
    """delta-io/delta-rs#2580: a commit with an application's version that is there already is not refused."""
    growing.grow(2, 3, publish=Publication("delta"))
    version = open_table(growing).version()
    assert publish_output(growing.output).lines == []
    publication = Publication("delta")
    growing.run(publication).finish()
    assert (publication.lines, open_table(growing).version()) == ([], version)
    path = open_table(growing).file_uris()[0].rpartition("/")[2]
    again: list[AddAction | RemoveAction] = [AddAction(path, 1, {}, 0, True, "{}")]
    properties = CommitProperties(app_transactions=[Transaction("sightline", 1)])
    open_table(growing).create_write_transaction(
        again, "append", open_table(growing).schema(), commit_properties=properties
    )
    assert open_table(growing).version() == version + 1, "deltalake refuses it now: the look before could go"


def test_a_compaction_moves_rows_and_is_no_change_for_those_who_follow_the_table(growing: GrowingOutput) -> None:
    """delta-io/delta#146, #906: streams read rows again that a transaction adds as new ones."""
    for _ in range(4):
        growing.grow(1, 5, rejected=[1, 2], publish=Publication("delta"))
    before = read_keys(growing)
    version = open_table(growing).version()
    compact_output(growing.output, SILENT)
    check(growing)
    assert read_keys(growing) == before
    assert len(open_table(growing).file_uris()) == 1
    [moved] = range(version + 1, open_table(growing).version() + 1)
    actions = [
        (name, action["dataChange"])
        for one in read_log(growing, moved)
        for name, action in one.items()
        if name in ("add", "remove")
    ]
    assert Counter(actions) == {("remove", False): 4, ("add", False): 1}


def test_a_retry_takes_rejects_out_and_puts_images_in(growing: GrowingOutput) -> None:
    growing.grow(3, 5, rejected=[1, 2], publish=Publication("delta"))
    growing.retry(still=[2], publish=Publication())
    check(growing)
    assert (len(read_keys(growing)), len(read_keys(growing, "rejects"))) == (12, 3)
    log = read_log(growing, open_table(growing, "rejects").version(), "rejects")
    names = Counter(name for one in log for name in one)
    assert (names["remove"], names["add"]) == (3, 3)
    assert {one["remove"]["dataChange"] for one in log if "remove" in one} == {True}


def test_a_retry_of_some_rows_of_a_merged_file_leaves_no_stale_row(growing: GrowingOutput) -> None:
    """The merged file holds rejects of all shards. A table names whole files, so that file is written anew."""
    for _ in range(4):
        growing.grow(1, 5, rejected=[1, 2], publish=Publication("delta"))
    compact_output(growing.output, SILENT)
    run = growing.run(Publication())
    run.retry(run.retries()[0])
    run.finish()
    check(growing)
    assert (len(read_keys(growing)), len(read_keys(growing, "rejects"))) == (14, 6)
    [name] = [path.name for path in (growing.root / "rejects").glob("*.parquet")]
    assert merged_at(f"rejects/{name}")


def test_a_table_that_is_new_for_an_output_with_stale_rows(growing: GrowingOutput) -> None:
    for _ in range(4):
        growing.grow(1, 5, rejected=[1, 2])
    compact_output(growing.output, SILENT)
    run = growing.run()
    run.retry(run.retries()[0])
    run.finish()
    publish_output(growing.output)
    check(growing)


def test_a_large_output_is_published_in_several_transactions(
    growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta, "TOGETHER", 2)
    growing.grow(5, 3)
    assert publish_output(growing.output).lines == [
        "the Delta table is up to date: 15 images; files: 5 added, 0 removed"
    ]
    check(growing)
    assert open_table(growing).version() == 3
    assert [read_log(growing, version)[-2]["txn"]["version"] for version in (1, 2, 3)] == [0, 0, 1]


def test_a_publication_that_fails_loses_nothing_and_is_made_up_for(growing: GrowingOutput) -> None:
    """While the table names the old files, they stay."""
    growing.grow(3, 5, rejected=[1], publish=Publication("delta"))
    log = growing.root / "rejects" / "_delta_log"
    log.rename(log.with_name("away"))
    log.write_text("no folder")
    publication = Publication("delta")
    manifest = growing.retry(publish=publication)
    assert manifest["rows_rejected"] == 0
    assert publication.failure.startswith("the table was not brought up to the output: the Delta table")
    assert "all that was committed stays: run `sightline publish" in publication.failure
    assert "\n" not in publication.failure
    with pytest.raises(StoreError, match="the table was not brought up"):
        compact_output(growing.output, SILENT)
    with pytest.raises(StoreError, match="the table was not brought up"):
        publish_output(growing.output)
    assert len([*(growing.root / "rejects").glob("*.parquet")]) == 3
    log.unlink()
    log.with_name("away").rename(log)
    assert len(read_keys(growing, "rejects")) == 3, "the table of before can be read until then"
    last = Publication()
    run = growing.run(last)
    assert not run.state.is_current(run.state.read_manifest())
    run.finish()
    assert last.failure == ""
    check(growing)
    assert not [*(growing.root / "rejects").glob("*.parquet")]
    assert not [*(growing.root / "runs").glob("*")]


def test_files_that_another_publication_still_needs_are_not_removed_as_orphans(growing: GrowingOutput) -> None:
    growing.grow(2, 5, rejected=[1], publish=Publication("delta"))
    growing.retry()  # a program of before, which does not know of tables
    assert len([*(growing.root / "rejects").glob("*.parquet")]) == 2
    report = verify_output(growing.output, remove_orphans=True)
    assert report.orphans_removed == 0
    assert any("its table may name them: run `sightline publish" in problem for problem in report.problems)
    publish_output(growing.output)
    check(growing)


def test_a_table_that_is_behind_is_told(growing: GrowingOutput) -> None:
    growing.grow(2, 5, publish=Publication("delta"))
    assert api.status(growing.root).tables == {"delta": ""}
    assert verify_output(growing.output).ok
    growing.grow(1, 3)  # by a program of before, which does not know of tables
    assert "behind the output: run `sightline publish" in api.status(growing.root).tables["delta"]
    shown = CliRunner().invoke(app, ["status", str(growing.root)], env={"COLUMNS": "300"})
    assert shown.exit_code == 0
    assert "delta: behind the output: run `sightline publish" in shown.output
    for since in (None, datetime.now(UTC).date()):
        report = verify_output(growing.output, since=since)
        assert not report.ok
        assert [problem for problem in report.problems if "the table delta: behind the output" in problem]
    publish_output(growing.output)
    assert api.status(growing.root).tables == {"delta": ""}
    assert verify_output(growing.output).ok


def test_a_run_that_publishes_during_a_verification_is_no_problem_of_the_table(
    growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing.grow(2, 5, publish=Publication("delta"))
    check_file, runs = verify._check_file, [1]

    def overtake(*arguments: Any) -> Any:
        if runs:
            runs.pop()
            growing.grow(1, 3, publish=Publication("delta"))
        return check_file(*arguments)

    monkeypatch.setattr(verify, "_check_file", overtake)
    report = verify_output(growing.output)
    assert not runs
    assert not [problem for problem in report.problems if "table" in problem], report.problems


def damage_last(log: Path) -> None:
    sorted(log.glob("*.json"))[-1].write_text("{no")


def remove_one(log: Path) -> None:
    sorted(log.glob("*.json"))[1].unlink()


@pytest.mark.parametrize("damage", [damage_last, remove_one])
def test_what_is_to_be_done_with_a_damaged_log_is_said(growing: GrowingOutput, damage: Callable[[Path], None]) -> None:
    for _ in range(3):
        growing.grow(1, 3, publish=Publication("delta"))
    damage(growing.root / "data" / "_delta_log")
    assert "delete its folder _delta_log, and `sightline publish`" in api.status(growing.root).tables["delta"]
    with pytest.raises(StoreError, match="delete its folder _delta_log, and `sightline publish`"):
        publish_output(growing.output)
    shutil.rmtree(growing.root / "data" / "_delta_log")
    publish_output(growing.output)
    check(growing)


def test_the_log_is_no_orphan_and_no_input(growing: GrowingOutput) -> None:
    for _ in range(11):  # with a checkpoint, which is a Parquet file
        growing.grow(1, 3, rejected=[0], publish=Publication("delta"))
    assert [*(growing.root / "data" / "_delta_log").glob("*.checkpoint.parquet")]
    report = verify_output(growing.output, remove_orphans=True)
    assert (report.ok, report.orphans_removed) == (True, 0)
    check(growing)
    assert sorted(ds.dataset(growing.root / "data").to_table()["key"].to_pylist()) == read_keys(growing)
    # One star: with two, DuckDB reads the checkpoint of the log as rows.
    found = duckdb.sql(f"select key from '{growing.root}/data/*.parquet' order by key").fetchall()
    assert [key for (key,) in found] == read_keys(growing)


def test_two_publications_at_once_add_each_file_once(growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    """delta-io/delta#1830, aws/aws-sdk-pandas#2771: writers at once, without a lock, lost each other's commits."""
    growing.grow(3, 5, publish=Publication("delta"))
    growing.grow(2, 5)
    late = growing.run()
    commit = delta.DeltaTables._commit
    others: list[bool] = []

    def overtake(*arguments: Any) -> bool:
        """Between the look and the commit of one process, another one publishes the same ledgers, and one more."""
        if not others:
            others.append(True)
            publish_output(growing.output)
            growing.grow(1, 5, publish=Publication())
        return commit(*arguments)

    monkeypatch.setattr(delta.DeltaTables, "_commit", overtake)
    publication = Publication()
    assert publication(late.state)
    assert publication.lines == []
    check(growing)


def test_what_another_run_seals_meanwhile_is_published_before_its_files_go(
    growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run is killed before its own publication, and this one reads its ledger while it cleans up."""
    growing.grow(2, 5, rejected=[1], publish=Publication("delta"))
    killed = growing.run(Publication())
    for ref in killed.retries():
        killed.retry(ref, still=[1])
    killed.state.ledger.seal()
    assert killed.state.bring_up(), "the table has files to which no manifest leads"
    run = growing.run(Publication())
    list_led_to = OutputState._list_led_to

    def read_another_ledger(state: OutputState) -> Any:
        other = growing.run()
        for ref in other.retries():
            other.retry(ref)
        other.state.ledger.seal()
        state.ledger.refresh()
        return list_led_to(state)

    delete = Output.delete

    def look_and_delete(output: Output, path: str) -> None:
        for kind in ("data", "rejects"):
            assert path not in [f"{kind}/{os.path.basename(uri)}" for uri in open_table(growing, kind).file_uris()]
        delete(output, path)

    monkeypatch.setattr(OutputState, "_list_led_to", read_another_ledger)
    monkeypatch.setattr(Output, "delete", look_and_delete)
    run.finish()
    assert not [*(growing.root / "rejects").glob("*.parquet")]
    assert (len(read_keys(growing)), len(read_keys(growing, "rejects"))) == (10, 0)


def test_conflicts_without_end_are_an_error(growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    growing.grow(1, 3)
    monkeypatch.setattr(delta.DeltaTables, "_commit", lambda *arguments: False)
    monkeypatch.setattr(delta, "_ATTEMPTS", 3)
    with pytest.raises(StoreError, match="other processes committed to the table 3 times meanwhile"):
        publish_output(growing.output)


def test_two_tables_are_made_at_once(growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    growing.grow(1, 3)
    create = delta.DeltaTables._create
    others: list[bool] = []

    def overtake(tables: Any, kind: Any) -> Any:
        if not others:
            others.append(True)
            publish_output(growing.output)
        return create(tables, kind)

    monkeypatch.setattr(delta.DeltaTables, "_create", overtake)
    publish_output(growing.output)
    check(growing)


def test_killed_writers_leave_each_row_once_or_not_yet(tmp_path: Path) -> None:
    """`benchmarks.killed_tables` kills a hundred times, and on S3."""
    table = kill_writers(str(tmp_path / "tags"), tmp_path, {}, kills=6, seed=int.from_bytes(os.urandom(2)), every=2)
    assert table.problems == []
    assert table.kills >= 6


def test_what_other_programs_did_to_the_table_is_put_right(growing: GrowingOutput) -> None:
    """OPTIMIZE and INSERT of another engine. The output is what counts."""
    for _ in range(3):
        growing.grow(1, 5, publish=Publication("delta"))
    open_table(growing).optimize.compact()
    assert len(open_table(growing).file_uris()) == 1
    growing.grow(1, 5, publish=Publication())
    assert read_keys(growing) == sorted(f"{number:06d}-000000/{row}" for number in range(4) for row in range(5))
    assert {os.path.basename(uri)[:8] for uri in open_table(growing).file_uris()} == {f"{n:06d}-0" for n in range(4)}
    report = verify_output(growing.output)
    assert [problem for problem in report.problems if "was written by no run" in problem]


def test_vacuum_deletes_nothing_that_was_committed(growing: GrowingOutput) -> None:
    """delta-io/delta-rs#2349: `full`, as in Spark, deletes every file of the folder that the table does not name."""
    growing.grow(2, 3, publish=Publication("delta"))
    growing.grow(1, 3)  # committed, and not published
    month = time.time() - 30 * 86400  # the default of Delta is a week
    for path in (growing.root / "data").glob("*.parquet"):
        os.utime(path, (month, month))
    assert open_table(growing).vacuum(full=True, dry_run=True) == []
    with pytest.raises(DeltaError, match="minimum retention"):
        open_table(growing).vacuum(168, full=True, dry_run=True)
    unsafe = open_table(growing).vacuum(168, enforce_retention_duration=False, full=True, dry_run=True)
    assert len(unsafe) == 1, "with Delta's default, the file would be deleted"


ODD = ["some folder", "a#b", "50%", "häuser", "x=y&z", "que?ry", "st*ar", "[0-9]"]


@pytest.mark.parametrize("name", ODD)
def test_a_folder_with_any_name_has_a_table(tmp_path: Path, name: str) -> None:
    """delta-io/delta-rs#2425, #1299 and pola-rs/polars#20944: a space or a percent sign was encoded, or decoded."""
    growing = GrowingOutput(tmp_path / name / "tags")
    growing.grow(2, 3, rejected=[0], publish=Publication("delta"))
    growing.grow(1, 3, publish=Publication())
    check(growing)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_whose_name_deltalake_decodes_is_refused(tmp_path: Path) -> None:
    growing = GrowingOutput(tmp_path / "a%20b" / "tags")
    growing.grow(1, 3)
    with pytest.raises(ConfigError, match=r"no Delta table can lie under a name with %20: rename the folder"):
        publish_output(growing.output)
    publication = Publication("delta")
    growing.grow(1, 3, publish=publication)
    assert "rename the folder" in publication.failure


def make_wide(root: Path, dtype: str = "float32") -> GrowingOutput:
    """An output with columns of many types that were copied from its inputs."""
    passed = pa.schema(
        [
            ("site", pa.string()),
            ("taken", pa.timestamp("us", "UTC")),
            ("local", pa.timestamp("us")),
            ("precise", pa.timestamp("ns", "UTC")),
            ("byte", pa.uint8()),
            ("Key", pa.string()),
            ("a name", pa.string()),
            ("day", pa.date32()),
            ("price", pa.decimal128(9, 2)),
            ("box", pa.list_(pa.int32(), 4)),
            ("camera", pa.struct([("make", pa.string()), ("iso", pa.int16())])),
            ("nothing", pa.null()),
        ]
    )
    values = {
        "site": "north",
        "taken": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "day": date(2026, 1, 2),
        "price": Decimal("12.50"),
        "byte": 200,
        "box": [1, 2, 3, 4],
        "camera": {"make": "a", "iso": 100},
    }
    made = SyntheticOutput(
        LABELS,
        draw_vectors(3, WIDTH, 1),
        2,
        lambda shard: draw_vectors(3, WIDTH, shard),
        dtype=dtype,
        thumbnail=lambda row: b"\xff\xd8 a jpeg",
        passed=passed,
        values=lambda rows: {name: [values.get(name)] * len(rows) for name in passed.names},
    )
    growing = GrowingOutput(root, made)
    publish_output(growing.output)
    return growing


def test_columns_have_the_values_that_were_written(tmp_path: Path) -> None:
    """delta-io/delta-rs#2175 makes -56 of 200, and #2882 a table that other engines refuse: these are left out."""
    growing = make_wide(tmp_path / "tags")
    table = open_table(growing)
    rows = table.to_pyarrow_table()
    files = ds.dataset(growing.root / "data").to_table()
    left_out = {"local", "precise", "byte", "Key", "a name", "nothing"}
    assert set(files.schema.names) - set(rows.schema.names) == left_out
    assert table.protocol().min_reader_version == 1, "every engine reads it"
    order = [("key", "ascending")]
    written, read = files.sort_by(order).to_pylist(), rows.sort_by(order).to_pylist()
    assert read == [{name: row[name] for name in rows.schema.names} for row in written]
    assert read[0]["thumbnail"] == b"\xff\xd8 a jpeg"
    assert read[0]["box"] == [1, 2, 3, 4]
    publication = Publication()
    growing.run(publication).finish()
    growing.grow(1, 2, publish=publication)
    assert publication.lines[1:] == [
        "the Delta table is without the column 'local': no table has the type timestamp[us]",
        "the Delta table is without the column 'precise': no table has the type timestamp[ns, tz=UTC]",
        "the Delta table is without the column 'byte': no table has the type uint8",
        "the Delta table is without the column 'Key': another column has this name in other letters",
        "the Delta table is without the column 'a name': no table may have ' ' in a name",
        "the Delta table is without the column 'nothing': no table has the type null",
    ]


def test_float16_embeddings_are_left_out(tmp_path: Path) -> None:
    """pola-rs/polars#27866 and others: no reader agrees with another about them. The files have them."""
    growing = make_wide(tmp_path / "tags", "float16")
    assert "embedding" not in open_table(growing).to_pyarrow_table().schema.names
    keys = pl.scan_delta(str(growing.root / "data")).select("key").collect()["key"].to_list()
    assert sorted(keys) == read_keys(growing)


def test_polars_reads_a_table(tmp_path: Path) -> None:
    """pola-rs/polars#27866: its own reader refuses the type of the embeddings, and pyarrow's gives a list."""
    growing = make_wide(tmp_path / "tags")
    uri = str(growing.root / "data")
    wanted = ds.dataset(growing.root / "data").to_table().sort_by("key")
    found = pl.scan_delta(uri, use_pyarrow=True).sort("key").collect()
    assert found["key"].to_list() == wanted["key"].to_pylist()
    assert found["embedding"].to_list() == wanted["embedding"].to_pylist()
    plain = pl.scan_delta(uri).drop("embedding", "box").sort("key").collect()
    assert plain["labels"].to_list() == wanted["labels"].to_pylist()
    with pytest.raises(pl.exceptions.SchemaError, match="data type mismatch for column embedding"):
        pl.scan_delta(uri).select("embedding").collect()


@pytest.mark.parametrize(
    ("type_", "wanted"),
    [
        (pa.list_(pa.float32(), 3), pa.list_(pa.field("element", pa.float32()))),
        (pa.dictionary(pa.int8(), pa.string()), pa.string()),
        (pa.large_string(), pa.string()),
        (pa.string_view(), pa.string()),
        (pa.large_binary(), pa.binary()),
        (pa.list_(pa.float16(), 3), None),
        (pa.list_(pa.uint16()), None),
        (pa.struct([("a", pa.uint8())]), None),
        (pa.time64("us"), None),
        (pa.duration("s"), None),
        (pa.timestamp("us", "Europe/Berlin"), None),
        (pa.timestamp("ms", "UTC"), None),
        (pa.decimal256(50, 2), None),
        (pa.map_(pa.string(), pa.string()), None),
    ],
)
def test_a_type_is_that_of_the_table_or_none(type_: pa.DataType, wanted: pa.DataType | None) -> None:
    assert convert_type(type_) == wanted
    if wanted is not None:
        assert choose_columns(pa.schema([("a", type_)])) == (pa.schema([("a", wanted)]), [])


def test_rows_of_a_file_are_added_up(growing: GrowingOutput) -> None:
    for _ in range(3):
        growing.grow(1, 5, rejected=[1])
    compact_output(growing.output, SILENT)
    [file] = list_files(growing.run().state.ledger, "data").to_pylist()
    path = next(iter((growing.root / "data").glob("*.parquet")))
    assert file == {"path": path.name, "rows": 12, "bytes": path.stat().st_size}
    publish_output(growing.output)
    assert open_table(growing).count() == 12
    actions = pa.table(open_table(growing).get_add_actions(flatten=True)).to_pylist()
    assert [(one["num_records"], one["size_bytes"]) for one in actions] == [(12, path.stat().st_size)]


def test_the_list_of_tables_is_checked(growing: GrowingOutput) -> None:
    growing.grow(1, 3)
    with pytest.raises(ConfigError, match="hudi is no table"):
        publish_output(growing.output, "hudi")
    assert read_tables(growing.output) == []
    publish_output(growing.output)
    assert read_tables(growing.output) == ["delta"]
    for text in ('{"tables": ["hudi"]}', '{"tables": 3}', "[]", "{"):
        (growing.root / TABLES).write_text(text)
        with pytest.raises(StoreError, match=r"tables\.json"):
            read_tables(growing.output)
        assert not Publication()(growing.run().state)


def test_an_output_that_is_none_has_no_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no plan here"):
        publish_output(Output(str(tmp_path)))
    growing = GrowingOutput(tmp_path / "tags")
    growing.plan(1)
    (growing.root / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="finish the output with `sightline tag` first"):
        publish_output(growing.output)


def test_without_deltalake_nothing_begins(growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    growing.grow(1, 3)
    monkeypatch.setitem(sys.modules, "deltalake", None)
    check_table(None, str(growing.root))
    with pytest.raises(ConfigError, match=r"^table: .*pip install 'sightline\[delta\]'"):
        check_table("delta", str(growing.root))
    with pytest.raises(ConfigError, match=r"pip install 'sightline\[delta\]'"):
        publish_output(growing.output)
    assert not (growing.root / TABLES).exists()


def test_a_table_takes_no_null_for_a_row_and_keeps_missing_values(growing: GrowingOutput) -> None:
    growing.grow(1, 2, publish=Publication("delta"))
    rows = open_table(growing).to_pyarrow_table().sort_by("row")
    assert rows["metadata"].to_pylist() == [None, None]
    assert not open_table(growing).schema().to_arrow().field("key").nullable
    vectors = np.array(rows["embedding"].to_pylist(), np.float32)
    assert vectors.shape == (2, WIDTH)
