"""The reader of finished outputs: tables, rows by position, and outputs that are refused."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from benchmarks.outputs import SyntheticOutput, write_output
from curation.tagged_output import TaggedOutput, open_output
from pipelines.output.output import Output
from pipelines.output.state import read_state
from pipelines.planning.plan import read_plan
from sightline.cli import app
from siglip.labels import LabelSet
from storage.settings import ConfigError
from tests.support.vectors import draw_vectors

ROWS = (50, 51, 52)
"""The tagged rows of each shard."""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    root = str(tmp_path_factory.mktemp("tagged") / "made")
    labels = LabelSet.model_validate({"names": ["cat", "dog", "bird"], "threshold": 0.001})
    write_output(
        root,
        SyntheticOutput(
            labels,
            draw_vectors(3, 16, 1),
            len(ROWS),
            lambda shard: draw_vectors(ROWS[shard], 16, shard),
            reject=lambda shard: ["truncated"] * shard,
        ),
    )
    return open_output(root)


def test_to_arrow_has_all_tagged_rows_and_all_columns(output: TaggedOutput) -> None:
    table = output.to_arrow()
    assert table.column_names == output.columns
    assert "id" not in table.column_names
    assert table.num_rows == output.rows == sum(ROWS)
    stored = pyarrow.dataset.dataset(Path(output.uri) / "data").to_table()
    assert table.sort_by("key").equals(stored.select(output.columns).sort_by("key"))


def test_to_arrow_has_the_requested_columns_in_their_order(output: TaggedOutput) -> None:
    table = output.to_arrow(["labels", "id", "key"])
    assert table.column_names == ["labels", "id", "key"]
    assert table.equals(pa.Table.from_batches(output.batches(["labels", "id", "key"], rows=7)))
    assert len(set(table["id"].to_pylist())) == output.rows


def test_a_passed_through_column_called_id_is_the_users_own(output: TaggedOutput, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(output.uri, copy)
    for path in (copy / "commits").iterdir():
        record = json.loads(path.read_text())
        for file in record["files"]:
            if file["path"].startswith("data/"):
                table = pq.read_table(copy / file["path"])
                ids = pa.array([f"mine {row}" for row in range(table.num_rows)])
                pq.write_table(table.append_column("id", ids), copy / file["path"])
                file["bytes"] = (copy / file["path"]).stat().st_size
        path.write_text(json.dumps(record))
    shutil.rmtree(copy / "ledger")
    read_state(Output(str(copy)), read_plan(Output(str(copy)))).finish({}, {}, [])
    fingerprint = json.loads((copy / "fingerprint.json").read_text())
    passed = pa.schema([("id", pa.string())])
    fingerprint["parquet.schema"] = base64.b64encode(passed.serialize()).decode()
    (copy / "fingerprint.json").write_text(json.dumps(fingerprint))
    found = open_output(str(copy))
    for table in (found.to_arrow(), found.to_arrow(["id", "key"])):
        assert table["id"].to_pylist()[:2] == ["mine 0", "mine 1"]
    assert next(found.batches(["id"]))["id"][0].as_py() == "000000-000000/0"  # what samples and answers name images by


def test_to_arrow_names_a_column_that_the_output_does_not_have(output: TaggedOutput) -> None:
    with pytest.raises(ConfigError, match=r"has no column 'embeddings': its columns are id, .*embedding"):
        output.to_arrow(["key", "embeddings"])


def test_take_returns_rows_in_the_requested_order(output: TaggedOutput) -> None:
    whole = output.to_arrow(["id", "key", "embedding"])
    positions = [120, 0, 51, 120, 49]
    assert output.take(positions, ["id", "key", "embedding"]).equals(whole.take(positions))
    assert output.take([], ["key"]).num_rows == 0


def test_unfinished_and_damaged_outputs_are_refused(output: TaggedOutput, tmp_path: Path) -> None:
    root = Path(output.uri)
    with pytest.raises(ConfigError, match="not a finished output"):
        open_output(str(tmp_path))
    copy = tmp_path / "copy"
    copy.mkdir()
    for folder in ("commits", "data", "ledger", "plan", "rejects"):
        (copy / folder).symlink_to(root / folder)
    manifest = json.loads((root / "manifest.json").read_text())
    (copy / "fingerprint.json").write_bytes((root / "fingerprint.json").read_bytes())
    (copy / "labels.parquet").write_bytes((root / "labels.parquet").read_bytes())
    for change, message in (
        ({"shards": 2}, "is not finished: 2 of 3 shards are committed: run"),
        (
            {"planned_shards": 4, "waiting": [{"reason": "missing", "detail": "/in/a.tar: no such file"}]},
            r"3 of 4 shards are committed \(1 missing\)",
        ),
        ({"ledgers": 2}, "names 2 ledgers, and there are 1"),
        ({"schema_version": 1}, "sightline upgrade"),
        ({"rows_tagged": 0}, "no tagged image"),
    ):
        (copy / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ConfigError, match=message):
            open_output(str(copy))
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert (open_output(str(copy)).rows, open_output(str(copy)).describe_waiting()) == (sum(ROWS), "")
    # An input that changed and is not tagged again is not planned. Every planned shard is committed.
    waiting = [
        {"name": "/in/a.jpg", "reason": "changed", "detail": "/in/a.jpg changed since it was planned", "rows": 1}
    ]
    (copy / "manifest.json").write_text(json.dumps({**manifest, "waiting": waiting}))
    assert open_output(str(copy)).rows == sum(ROWS)
    assert "1 changed, such as /in/a.jpg changed since" in open_output(str(copy)).describe_waiting()
    result = CliRunner().invoke(app, ["report", str(copy), "--to", str(tmp_path / "report.html")])
    assert (result.exit_code, "/in/a.jpg changed" in result.stderr) == (0, True), result.stderr
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (copy / "labels.parquet").write_bytes(b"none")
    with pytest.raises(ConfigError, match=r"labels\.parquet is damaged"):
        open_output(str(copy))
