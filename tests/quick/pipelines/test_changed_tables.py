"""Tables that are not as they were left: of an output that was made anew, restored or moved, or by another program.

What must not happen is that a table lacks rows, has them twice or cannot be read, and nobody is told.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, Field, write_deltalake
from deltalake.schema import PrimitiveType
from pyiceberg.catalog import load_catalog
from pyiceberg.table import Table

from benchmarks.outputs import SyntheticOutput
from curation.tagged_output import open_output
from pipelines.output.output import TABLES
from pipelines.tables.columns import choose_columns
from pipelines.tables.delta import check_uri
from pipelines.tables.iceberg import check_place
from pipelines.tables.publication import Publication, publish_output, read_tables
from storage.settings import ConfigError
from storage.store import StoreError
from tests.quick.pipelines.test_iceberg import configure
from tests.support.growing_output import LABELS, WIDTH, GrowingOutput
from tests.support.table_writer import make_catalog
from tests.support.vectors import draw_vectors

ICEBERG = "iceberg:tests/photos.images"
TABLE_NAMES = ["delta", ICEBERG]


@pytest.fixture(autouse=True)
def _catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, make_catalog(tmp_path, str(tmp_path)))


@pytest.fixture
def growing(tmp_path: Path) -> GrowingOutput:
    return GrowingOutput(tmp_path / "tags")


def open_delta(growing: GrowingOutput) -> DeltaTable:
    return DeltaTable(str(growing.root / "data"))


def open_iceberg(kind: str = "") -> Table:
    return load_catalog("tests").load_table(f"photos.images{kind}")


def read_keys(growing: GrowingOutput, name: str) -> list[str]:
    if name == "delta":
        return sorted(open_delta(growing).to_pyarrow_table(columns=["key"])["key"].to_pylist())
    return sorted(open_iceberg().scan(selected_fields=("key",)).to_arrow()["key"].to_pylist())


def check(growing: GrowingOutput, name: str) -> None:
    """The table has the rows of the ledgers."""
    batches = open_output(str(growing.root)).batches(["key"])
    assert read_keys(growing, name) == sorted(key for batch in batches for key in batch["key"].to_pylist())


def restore(growing: GrowingOutput, backup: Path) -> None:
    """Put a backup in the place of an output. The log of its Delta table is the later one."""
    logs = {kind: growing.root / kind / "_delta_log" for kind in ("data", "rejects")}
    for kind, log in logs.items():
        if log.exists():
            shutil.copytree(log, backup / kind / "_delta_log", dirs_exist_ok=True)
    shutil.rmtree(growing.root)
    shutil.copytree(backup, growing.root)


@pytest.mark.parametrize("name", TABLE_NAMES)
@pytest.mark.parametrize("nights", [1, 3, 4])
def test_an_output_that_is_restored_from_a_backup_has_its_table(
    growing: GrowingOutput, tmp_path: Path, name: str, nights: int
) -> None:
    """The table was at three ledgers. Those that come after the backup are other ones, be they as many."""
    growing.grow(1, 4, publish=Publication(name))
    shutil.copytree(growing.root, tmp_path / "backup")
    for _ in range(2):
        growing.grow(1, 4, publish=Publication())
    restore(growing, tmp_path / "backup")
    for _ in range(nights):
        growing.grow(1, 5, publish=Publication())
        check(growing, name)


def test_an_output_that_is_made_anew_in_the_same_place_has_its_table(growing: GrowingOutput) -> None:
    """A catalogue still has the table of an output that was deleted."""
    for _ in range(3):
        growing.grow(1, 4, rejected=[0], publish=Publication(ICEBERG))
    shutil.rmtree(growing.root)
    anew = GrowingOutput(growing.root)
    anew.grow(1, 5, rejected=[0, 1], publish=Publication(ICEBERG))
    check(anew, ICEBERG)
    assert open_iceberg("_rejects").scan().count() == 2
    anew.grow(4, 5, publish=Publication())
    check(anew, ICEBERG)


def test_a_table_of_an_earlier_version_is_taken_up(growing: GrowingOutput) -> None:
    """It has the number of ledgers, and no digest of them."""
    for name in TABLE_NAMES:
        growing.grow(2, 4, publish=Publication(name))
    with open_iceberg().transaction() as transaction:
        transaction.remove_properties("sightline.state")
    growing.grow(1, 4, publish=Publication())
    for name in TABLE_NAMES:
        check(growing, name)


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_publish_undoes_a_delete_of_another_program(growing: GrowingOutput, name: str) -> None:
    for _ in range(3):
        growing.grow(1, 4, publish=Publication(name))
    if name == "delta":
        open_delta(growing).delete("row = 1")
    else:
        open_iceberg().delete("row = 1")
    assert len(read_keys(growing, name)) == 9
    lines = publish_output(growing.output).lines
    assert len(lines) == 1
    check(growing, name)
    assert publish_output(growing.output).lines == []


def test_a_snapshot_that_is_not_ours_is_compared_at_the_next_run(growing: GrowingOutput) -> None:
    """A table that went back to an earlier snapshot still has the later number of ledgers among its properties."""
    for _ in range(3):
        growing.grow(1, 4, publish=Publication(ICEBERG))
    table = open_iceberg()
    with table.manage_snapshots() as snapshots:
        snapshots.rollback_to_snapshot(table.snapshots()[0].snapshot_id)
    assert len(read_keys(growing, ICEBERG)) == 4
    growing.grow(1, 4, publish=Publication())
    check(growing, ICEBERG)


def test_a_file_that_another_program_added_again_is_there_once(growing: GrowingOutput) -> None:
    growing.grow(2, 4, publish=Publication(ICEBERG))
    [first, _] = open_iceberg().inspect.data_files()["file_path"].to_pylist()
    table = open_iceberg()
    with table.transaction() as transaction, transaction.update_snapshot().fast_append() as append:
        append.append_data_file(next(iter(table.scan().plan_files())).file)
    assert len(read_keys(growing, ICEBERG)) == 12, first
    growing.grow(1, 4, publish=Publication())
    check(growing, ICEBERG)


def change_protocol(growing: GrowingOutput, *actions: dict[str, Any]) -> None:
    """Write the next version of the log, as a newer program does."""
    log = growing.root / "data" / "_delta_log"
    path = log / f"{open_delta(growing).version() + 1:020d}.json"
    path.write_text("".join(f"{json.dumps(action)}\n" for action in actions))


UPGRADED: list[tuple[dict[str, Any], str]] = [
    (
        {
            "minReaderVersion": 3,
            "minWriterVersion": 7,
            "readerFeatures": ["deletionVectors"],
            "writerFeatures": ["deletionVectors"],
        },
        "its readers need deletionVectors",
    ),
    ({"minReaderVersion": 2, "minWriterVersion": 5}, "its readers need version 2"),
    (
        {"minReaderVersion": 1, "minWriterVersion": 7, "writerFeatures": ["inCommitTimestamp", "appendOnly"]},
        "its writers need inCommitTimestamp",
    ),
]


@pytest.mark.parametrize(("protocol", "words"), UPGRADED, ids=[words for _, words in UPGRADED])
def test_a_table_that_a_newer_program_upgraded_is_refused(
    growing: GrowingOutput, protocol: dict[str, Any], words: str
) -> None:
    """With deletion vectors, the log names a file whose rows do not all count."""
    growing.grow(2, 4, publish=Publication("delta"))
    change_protocol(growing, {"protocol": protocol})
    publication = Publication()
    growing.grow(1, 4, publish=publication)
    assert f"was changed by another program: {words}: delete its folder _delta_log" in publication.failure
    shutil.rmtree(growing.root / "data" / "_delta_log")
    publish_output(growing.output)
    check(growing, "delta")


def test_a_table_with_a_feed_of_its_changes_is_none_that_is_refused(growing: GrowingOutput) -> None:
    growing.grow(2, 4, publish=Publication("delta"))
    features = {"minReaderVersion": 1, "minWriterVersion": 7, "writerFeatures": ["changeDataFeed", "appendOnly"]}
    change_protocol(growing, {"protocol": features})
    open_delta(growing).alter.add_columns([Field("note", PrimitiveType("string"))])
    growing.grow(1, 4, publish=Publication())
    check(growing, "delta")


def test_a_table_of_other_columns_is_refused(growing: GrowingOutput) -> None:
    growing.grow(2, 4, publish=Publication("delta"))
    other = pa.table({"key": [1, 2]})
    write_deltalake(str(growing.root / "data"), other, mode="overwrite", schema_mode="overwrite")
    publication = Publication()
    growing.run(publication).finish()
    assert "the column 'key' is not there, or has another type" in publication.failure, "though nothing was new"
    with pytest.raises(StoreError, match=r"delete its folder _delta_log, and run `sightline publish`"):
        publish_output(growing.output)


def test_a_table_that_another_program_partitioned_is_refused(growing: GrowingOutput) -> None:
    growing.grow(1, 4, publish=Publication(ICEBERG))
    with open_iceberg().update_spec() as update:
        update.add_identity("source")
    publication = Publication()
    growing.grow(1, 4, publish=publication)
    assert "photos.images was partitioned by another program: drop the table" in publication.failure


def test_a_table_that_is_out_of_reach_keeps_no_other_one_back(growing: GrowingOutput, tmp_path: Path) -> None:
    """As after an output was moved: the catalogue's table names the files of the old place."""
    for name in (ICEBERG, "delta"):
        growing.grow(1, 4, publish=Publication(name))
    moved = GrowingOutput(growing.root.rename(tmp_path / "moved"))
    publication = Publication()
    moved.grow(1, 4, publish=publication)
    assert f"is a table of {growing.uri}: give another name. If this output was moved" in publication.failure
    check(moved, "delta")
    with pytest.raises(StoreError, match="If this output was moved"):
        publish_output(moved.output, "iceberg:tests/photos.others")
    assert load_catalog("tests").load_table("photos.others").scan().count() == 12
    (moved.root / TABLES).write_text(json.dumps({"tables": ["delta", "iceberg:tests/photos.others"]}))
    assert publish_output(moved.output).lines == []


@pytest.mark.parametrize("name", ["iceberg:tests/a..b", "iceberg:none/photos.images", ICEBERG])
def test_a_name_that_cannot_be_had_is_not_kept(growing: GrowingOutput, name: str) -> None:
    """Else every later run would fail, though its configuration was corrected."""
    catalog = load_catalog("tests")
    catalog.create_namespace("photos")
    catalog.create_table("photos.images", pa.schema([("x", pa.int64())]))
    publication = Publication(name)
    growing.grow(1, 4, publish=publication)
    assert publication.failure
    assert read_tables(growing.output) == []
    publication = Publication("delta")
    growing.grow(1, 4, publish=publication)
    assert not publication.failure
    check(growing, "delta")


def test_an_output_without_an_image_has_no_table_yet(growing: GrowingOutput) -> None:
    growing.plan(1)
    with pytest.raises(ConfigError, match="nothing is committed here yet: run `sightline tag` first"):
        publish_output(growing.output)


@pytest.mark.parametrize("name", ["a#b", "a?b", "a\nb", "a\tb"])
def test_folders_that_no_iceberg_table_can_name_are_refused(tmp_path: Path, name: str) -> None:
    """pyiceberg reads such names in part, so that the table would name files that are not there."""
    with pytest.raises(ConfigError, match=r"no Iceberg table can name files under .*: rename the folder"):
        check_place(str(tmp_path / name / "tags"))
    with pytest.raises(ConfigError, match="rename the folder"):
        check_place(f"s3://bucket/{name}")


@pytest.mark.parametrize("name", ["a\nb", "a\\b"])
def test_folders_that_no_delta_table_can_lie_under_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no Delta table can lie under a name with .*: rename the folder"):
        check_uri(f"/data/{name}/tags")


def make_output(root: Path, types: dict[str, pa.DataType], dtype: str = "float32") -> GrowingOutput:
    """An output with columns of these types, whose values are all null."""
    passed = pa.schema(list(types.items()))
    made = SyntheticOutput(
        LABELS,
        draw_vectors(3, WIDTH, 1),
        1,
        lambda shard: draw_vectors(3, WIDTH, shard),
        dtype=dtype,
        passed=passed,
        values=lambda rows: {name: pa.nulls(len(rows), type_) for name, type_ in types.items()},
    )
    return GrowingOutput(root, made)


LEFT_OUT = {
    "byte": pa.uint8(),
    "local": pa.timestamp("us"),
    "precise": pa.timestamp("ns", "UTC"),
    "a name": pa.list_(pa.struct([("x", pa.float32())])),
    "pairs": pa.map_(pa.string(), pa.list_(pa.int32())),
    "half": pa.float16(),
}


def test_pyiceberg_reads_a_table_without_some_columns_of_the_files(tmp_path: Path) -> None:
    """It refuses files with a column that the name mapping does not have, whatever columns it is asked for."""
    wide = make_output(tmp_path / "wide", LEFT_OUT, "float16")
    lines = publish_output(wide.output, ICEBERG).lines
    assert len(lines) == 1 + len(LEFT_OUT) + 1, "the embedding too"
    rows = open_iceberg().scan().to_arrow()
    assert len(rows) == 3
    assert not {"embedding", *LEFT_OUT} & {*rows.schema.names}
    check(wide, ICEBERG)
    with open_iceberg().transaction() as transaction:  # as an earlier version made it
        transaction.set_properties(
            {"schema.name-mapping.default": open_iceberg().schema().name_mapping.model_dump_json()}
        )
    with pytest.raises(ValueError, match="Could not find field"):
        open_iceberg().scan().to_arrow()
    publish_output(wide.output)
    check(wide, ICEBERG)


def test_it_is_said_when_pyiceberg_cannot_read_a_table(tmp_path: Path) -> None:
    wide = make_output(tmp_path / "wide", {"time": pa.time32("ms"), "byte": pa.uint8()})
    lines = publish_output(wide.output, ICEBERG).lines
    assert lines[-1] == (
        "pyiceberg cannot read the Iceberg table, because of the column 'time' of the files; others may"
    )
    with pytest.raises(Exception, match="unsupported type"):
        open_iceberg().scan().to_arrow()


def struct(*names: str) -> pa.DataType:
    return pa.struct([(name, pa.int64()) for name in names])


@pytest.mark.parametrize(
    ("types", "reason"),
    [
        ({"c": struct("a", "A")}, "'c': two of its fields have one name, or differ only in case"),
        ({"c": pa.list_(struct("a", "a"))}, "'c': two of its fields have one name, or differ only in case"),
        ({"c": struct("a b")}, "'c': no table may have ' ' in a name"),
        ({"c": pa.list_(struct(""))}, "'c': no table may have an empty name"),
        ({"a": struct("b"), "A.b": pa.int64()}, "'A.b': another column has this name as a field"),
        ({"a.b": pa.int64(), "a": struct("b")}, "'a': one of its fields has the name of another column"),
        ({"labels.element": pa.int64()}, "'labels.element': another column has this name as a field"),
    ],
)
def test_names_of_fields_that_no_table_may_have(tmp_path: Path, types: dict[str, pa.DataType], reason: str) -> None:
    """deltalake or pyiceberg refused to make a table with such a column, and then there was none."""
    wide = make_output(tmp_path / "wide", types)
    assert choose_columns(open_output(str(wide.root)).format.data_schema())[1] == [reason]
    for name in TABLE_NAMES:
        lines = publish_output(wide.output, name).lines
        assert lines[1] == f"the {'Delta' if name == 'delta' else 'Iceberg'} table is without the column {reason}"
        if len(lines) == 2:
            check(wide, name)
        else:
            assert lines[2].startswith("pyiceberg cannot read the Iceberg table")
            with pytest.raises(ValueError, match="multiple fields for name"):
                check(wide, name)
