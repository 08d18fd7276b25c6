"""Iceberg tables of outputs, in a catalogue in SQLite: every row once, whatever runs, fails or is killed.

The reports of others' trouble that a test's docstring names are issues of public repositories.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyiceberg.catalog import load_catalog
from pyiceberg.table import Table
from pyiceberg.utils.config import Config

from benchmarks.outputs import SyntheticOutput
from curation.tagged_output import open_output
from pipelines.config import JobConfig
from pipelines.tables import iceberg
from pipelines.tables.publication import Publication, check_table, publish_output, read_tables
from pipelines.upkeep import compaction
from pipelines.upkeep.compaction import compact_output
from storage.settings import ConfigError
from storage.store import StoreError
from tests.support.growing_output import LABELS, WIDTH, GrowingOutput
from tests.support.table_writer import kill_writers, make_catalog
from tests.support.vectors import draw_vectors

SILENT: Any = SimpleNamespace(say=lambda line: None)
NAME = "iceberg:tests/photos.images"


def configure(patch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Set environment variables, which pyiceberg reads when it is imported."""
    for name, value in environment.items():
        patch.setenv(name, value)
    patch.setattr("pyiceberg.catalog._ENV_CONFIG", Config())


@pytest.fixture
def growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GrowingOutput:
    monkeypatch.setattr(compaction, "LEAST_FILES", 3)
    configure(monkeypatch, make_catalog(tmp_path, str(tmp_path)))
    return GrowingOutput(tmp_path / "some folder" / "tags")


def open_table(kind: str = "data") -> Table:
    return load_catalog("tests").load_table(f"photos.images{'_rejects' if kind == 'rejects' else ''}")


def read_keys(kind: str = "data") -> list[str]:
    keys: list[str] = open_table(kind).scan(selected_fields=("key",)).to_arrow()["key"].to_pylist()
    return sorted(keys)


def check(growing: GrowingOutput) -> None:
    """The tables have the rows that the ledgers have, and the output is whole."""
    output = open_output(str(growing.root))
    for kind, batches in (("data", output.batches(["key"])), ("rejects", output.rejects(["key"]))):
        assert read_keys(kind) == sorted(key for batch in batches for key in batch["key"].to_pylist()), kind
    growing.check()


def test_runs_retries_and_compactions_are_followed(growing: GrowingOutput) -> None:
    for night in range(4):
        publication = Publication(NAME)
        growing.grow(2, 5, rejected=[1, 2], publish=publication)
        assert publication.lines == [
            f"the Iceberg table is up to date: {6 * (night + 1)} images; files: 4 added, 0 removed"
        ]
        check(growing)
    assert len(open_table().snapshots()) == 4, "a night is one snapshot"
    compact_output(growing.output, SILENT)
    check(growing)
    assert len(open_table().inspect.data_files()) == 1
    run = growing.run(Publication())
    run.retry(run.retries()[0], [1])
    run.finish()
    check(growing)
    assert (len(read_keys()), len(read_keys("rejects"))) == (25, 15)
    assert not (growing.root / "data" / "_delta_log").exists()


def test_what_is_published_is_not_published_again(growing: GrowingOutput) -> None:
    """apache/iceberg#2735, apache/iceberg-python#998: a file that was added twice had its rows twice."""
    growing.grow(2, 3, rejected=[0], publish=Publication(NAME))
    growing.grow(1, 3, publish=Publication())  # without a rejected row
    assert [open_table(kind).properties["sightline.ledgers"] for kind in ("data", "rejects")] == ["2", "2"]
    snapshot = open_table().current_snapshot()
    assert snapshot is not None
    assert snapshot.summary is not None
    assert snapshot.summary["sightline.ledgers"] == "2"
    assert publish_output(growing.output).lines == []
    growing.run(Publication(NAME)).finish()
    assert open_table().current_snapshot() == snapshot
    check(growing)


def test_another_publication_is_faster(growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    """apache/iceberg-python#3320: a commit that is repeated on the other's state would add its files again."""
    growing.grow(3, 5, rejected=[1], publish=Publication(NAME))
    growing.grow(2, 5)
    late = growing.run()
    commit = iceberg.IcebergTables._commit
    others: list[bool] = []

    def overtake(*arguments: Any) -> bool:
        if not others:
            others.append(True)
            publish_output(growing.output)
            growing.grow(1, 5, rejected=[2], publish=Publication())
        return commit(*arguments)

    monkeypatch.setattr(iceberg.IcebergTables, "_commit", overtake)
    publication = Publication()
    assert publication(late.state), publication.failure
    assert publication.lines == []
    check(growing)
    monkeypatch.setattr(iceberg.IcebergTables, "_commit", lambda *arguments: False)
    monkeypatch.setattr(iceberg, "_ATTEMPTS", 2)
    growing.grow(1, 5)
    with pytest.raises(StoreError, match=r"photos\.images: other processes committed to it 2 times meanwhile"):
        publish_output(growing.output)


def test_a_table_without_a_file_is_followed_too(growing: GrowingOutput) -> None:
    """pyiceberg's own list of the files of a table raises an exception if there is none."""
    for _ in range(4):
        growing.grow(1, 3, publish=Publication(NAME))
    compact_output(growing.output, SILENT)
    check(growing)
    assert (len(read_keys()), len(read_keys("rejects"))) == (12, 0)


def test_a_large_output_is_published_in_several_snapshots(
    growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iceberg, "TOGETHER", 2)
    growing.grow(5, 3)
    publish_output(growing.output, NAME)
    assert len(open_table().snapshots()) == 3
    check(growing)


def test_columns_are_found_by_their_names(growing: GrowingOutput, tmp_path: Path) -> None:
    """apache/iceberg-python#2131, apache/beam#39836: files without ids of fields gave nulls, or columns by position."""
    made = SyntheticOutput(
        LABELS, draw_vectors(3, WIDTH, 1), 1, lambda shard: draw_vectors(3, WIDTH, shard), thumbnail=lambda row: b"jpeg"
    )
    wide = GrowingOutput(tmp_path / "wide", made)
    publish_output(wide.output, NAME)
    assert open_table().properties["schema.name-mapping.default"]
    rows = open_table().scan().to_arrow().sort_by("key")
    written = open_output(str(wide.root)).to_arrow(rows.schema.names).sort_by("key")
    assert rows.to_pylist() == written.to_pylist()
    assert rows["thumbnail"].to_pylist() == [b"jpeg"] * 3
    assert None not in rows["embedding"].to_pylist()


def test_a_table_of_another_output_is_refused(growing: GrowingOutput, tmp_path: Path) -> None:
    growing.grow(1, 3, publish=Publication(NAME))
    other = GrowingOutput(tmp_path / "other")
    other.grow(1, 3)
    with pytest.raises(StoreError, match=r"photos\.images is a table of .*some folder/tags: give another name"):
        publish_output(other.output, NAME)
    with open_table().transaction() as transaction:
        transaction.set_properties({"commit.retry.num-retries": "4"})
    growing.grow(1, 3)
    with pytest.raises(StoreError, match=r"another commit\.retry\.num-retries than 0"):
        publish_output(growing.output)


def test_a_catalogue_that_is_away_loses_nothing_and_is_made_up_for(
    growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing.grow(2, 3, rejected=[0], publish=Publication(NAME))
    with monkeypatch.context() as patch:
        configure(patch, {"PYICEBERG_CATALOG__TESTS__URI": "sqlite:////nowhere/catalog.db"})
        publication = Publication()
        manifest = growing.retry(publish=publication)
        assert manifest["rows_tagged"] == 6
        assert "the Iceberg table photos.images in the catalogue tests cannot be used" in publication.failure
        assert "\n" not in publication.failure
    assert len(read_keys("rejects")) == 2, "its files are still there"
    publish_output(growing.output)
    check(growing)


def test_killed_writers_leave_each_row_once_or_not_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks.killed_tables --iceberg` kills a hundred times."""
    environment = make_catalog(tmp_path, str(tmp_path))
    configure(monkeypatch, environment)
    seed = int.from_bytes(os.urandom(2))
    table = kill_writers(str(tmp_path / "tags"), tmp_path, environment, kills=4, seed=seed, every=2, name=NAME)
    assert table.problems == []
    assert table.kills >= 4


@pytest.mark.parametrize("name", ["iceberg", "iceberg:prod", "iceberg:prod/images", "iceberg:a/b/c.d", "Delta", ""])
def test_names_that_are_none_are_refused(name: str) -> None:
    keys = {"input": ["photos"], "output": "tags", "labels": ["cat"]}
    with pytest.raises(ValueError, match="write delta, or iceberg:CATALOG"):
        JobConfig.model_validate({**keys, "table": name})
    assert JobConfig.model_validate({**keys, "table": "iceberg:prod/a.b.images"}).table == "iceberg:prod/a.b.images"


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_outputs_in_other_clouds_are_refused_before_a_run(scheme: str) -> None:
    with pytest.raises(ConfigError, match=f"^table: {scheme}://bucket/out: .* use the table delta for {scheme}://$"):
        check_table(NAME, f"{scheme}://bucket/out")
    check_table(NAME, "s3://bucket/out")


def test_without_pyiceberg_nothing_begins(growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    growing.grow(1, 3)
    monkeypatch.setitem(sys.modules, "pyiceberg", None)
    with pytest.raises(ConfigError, match=r"^table: .*pip install 'sightline\[iceberg\]'"):
        check_table(NAME, str(growing.root))
    with pytest.raises(ConfigError, match=r"pip install 'sightline\[iceberg\]'"):
        publish_output(growing.output, NAME)
    assert read_tables(growing.output) == []
