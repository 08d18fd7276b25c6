"""An output of an earlier version: refused with the command to run, upgraded, verified, compacted and retagged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from curation.tagged_output import open_output
from pipelines.output.output import Output
from pipelines.planning.plan import list_shards, read_plan, read_shard_inputs
from pipelines.upkeep import compaction
from pipelines.upkeep.verify import verify_output
from sightline import api
from sightline.cli import app
from siglip.labels import LabelSet
from storage.settings import ConfigError
from tests.support.earlier_output import PHOTOS, REJECTED, ROWS, SHARDS, unpack
from tests.support.growing_output import GrowingOutput, read_rows_by_id
from tests.support.stores.interrupted import kill_everywhere


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    return unpack(tmp_path)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"})


def test_a_plan_with_a_row_group_for_each_shard_is_read(earlier: Path) -> None:
    output = Output(str(earlier))
    refs = list(list_shards(output))
    assert [(ref.shard, ref.group, ref.rows) for ref in refs] == [
        ("000000-000000", 0, 3),
        ("000000-000001", 1, 4),
        ("000000-000002", 2, 3),
        ("000000-000003", 3, 2),
    ]
    inputs = [[planned.uri for planned in read_shard_inputs(output, ref)] for ref in refs]
    names = [["a.tar"], ["b.tar"], ["c.tar", "loose/0.jpg"], ["loose/1.jpg", "loose/2.jpg"]]
    assert inputs == [[f"{PHOTOS}/{name}" for name in shard] for shard in names]
    plan = read_plan(output)
    assert plan.columns == set()
    assert plan.holds(f"{PHOTOS}/loose")
    assert not plan.holds(f"{PHOTOS}/other")


def test_a_reader_names_the_command_to_run(earlier: Path) -> None:
    with pytest.raises(ConfigError, match=rf"if it was an earlier one, run `sightline upgrade {earlier}`"):
        open_output(str(earlier))


def test_verify_names_the_command_to_run(earlier: Path) -> None:
    report = verify_output(Output(str(earlier)))
    assert (report.missing, report.duplicates, report.rows_in) == (0, 0, ROWS)
    assert report.problems == [f"manifest.json is of an earlier version: run `sightline upgrade {earlier}`"]
    assert not report.ok


def test_the_status_is_the_same_before_and_after(earlier: Path) -> None:
    before = api.status(earlier)
    assert (before.planned, before.committed, before.rows_in, before.rows_rejected) == (SHARDS, SHARDS, ROWS, REJECTED)
    assert before.reasons == {"not_an_image": 1}
    api.upgrade(earlier)
    after = api.status(earlier)
    assert (after.planned, after.committed, after.rows_in, after.reasons) == (SHARDS, SHARDS, ROWS, before.reasons)
    assert after.runs[0]["images_per_second"] == 3.27
    assert after.under_way == []
    for output in (earlier, earlier):
        result = invoke("status", str(output))
        assert result.exit_code == 0
        assert "4 committed of 4 planned" in result.stdout


def test_upgrade_writes_a_ledger_and_no_data(earlier: Path) -> None:
    before = {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file() and path.name != "manifest.json"}
    result = invoke("upgrade", str(earlier))
    assert (result.exit_code, result.stdout.strip()) == (0, f"{earlier} has 4 committed shards in its ledgers")
    after = {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file() and path.name != "manifest.json"}
    assert before.items() <= after.items()
    assert {path.name for path in after.keys() - before.keys()} == {"000000.parquet"}
    report = verify_output(Output(str(earlier)))
    assert report.ok, report.problems
    output = open_output(str(earlier))
    assert (output.rows, output.rejected, output.manifest["ledgers"]) == (ROWS - REJECTED, REJECTED, 1)
    assert len(read_rows_by_id(output)) == ROWS
    assert api.upgrade(earlier) == SHARDS  # once more: nothing changes
    assert open_output(str(earlier)).manifest == output.manifest


def test_an_upgrade_that_is_killed_anywhere_is_done_again(tmp_path: Path) -> None:
    unpack(tmp_path / "whole")
    kills = 0

    def upgrade(left: int) -> None:
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "made", copy_function=shutil.copyfile)
        api.upgrade(tmp_path / "made/tagged")

    for _ in kill_everywhere(upgrade):
        kills += 1
        status = api.status(tmp_path / "made/tagged")
        assert (status.planned, status.committed, status.rows_in) == (SHARDS, SHARDS, ROWS)
        assert api.upgrade(tmp_path / "made/tagged") == SHARDS
        assert verify_output(Output(str(tmp_path / "made/tagged"))).problems == []
        assert len(read_rows_by_id(open_output(str(tmp_path / "made/tagged")))) == ROWS
    assert kills > 1


def test_a_compaction_upgrades_too(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "LEAST_FILES", 2)
    result = invoke("compact", str(earlier))
    assert result.exit_code == 0, result.stderr
    assert "5 files before, 2 now" in result.stdout
    assert verify_output(Output(str(earlier))).problems == []
    assert len(read_rows_by_id(open_output(str(earlier)))) == ROWS


def test_it_can_be_retagged(earlier: Path, tmp_path: Path) -> None:
    api.upgrade(earlier)
    output = GrowingOutput(earlier)
    labels = open_output(str(earlier)).labels.model_dump(mode="json", exclude_defaults=True)
    manifest = output.retag(tmp_path / "other", LabelSet.model_validate({**labels, "top_k": 1}))
    assert (manifest["planned_shards"], manifest["rows_in"], manifest["rows_rejected"]) == (SHARDS, ROWS, REJECTED)
    found = read_rows_by_id(open_output(str(tmp_path / "other")))
    assert found.keys() == read_rows_by_id(open_output(str(earlier))).keys()
    assert verify_output(Output(str(tmp_path / "other"))).problems == []


@pytest.mark.parametrize("damage", ["not json", "{}"])
def test_a_damaged_commit_record_is_named(earlier: Path, damage: str) -> None:
    (earlier / "commits/000000-000002.json").write_text(damage)
    before = (earlier / "manifest.json").read_text()
    result = invoke("upgrade", str(earlier))
    assert result.exit_code == 1
    assert "commits/000000-000002.json" in result.stderr.strip().splitlines()[-1]
    assert (earlier / "manifest.json").read_text() == before
    assert not (earlier / "ledger").exists()


def test_an_earlier_output_without_a_manifest_is_upgraded_too(earlier: Path) -> None:
    """Its run was killed at the end."""
    (earlier / "manifest.json").unlink()
    assert api.upgrade(earlier) == SHARDS
    assert json.loads((earlier / "manifest.json").read_text())["runs"] == []
    assert verify_output(Output(str(earlier))).problems == []
