"""A job goes on in an output of an earlier version: what is missing, rejected rows, and new inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from curation.retag import retag_output
from curation.tagged_output import open_output
from pipelines.output.output import Output
from pipelines.upkeep.verify import verify_output
from siglip.labels import LabelSet
from tests.support.earlier_output import LABELS, REJECTED, ROWS, unpack_here
from tests.support.growing_output import read_rows_by_id
from tests.support.jobs import RecordedProgress, make_image, run_sightline

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    return unpack_here(tmp_path)


def tag(earlier: Path, *words: str) -> str:
    """Run the job, which must succeed. Return what it prints."""
    config = earlier.parent / "job.yaml"
    keys = {"input": str(earlier.parent / "photos"), "output": str(earlier), "labels": LABELS}
    config.write_text(yaml.safe_dump({**keys, "rows_per_shard": 3, "max_reject_fraction": 1, "ray": {"readers": 2}}))
    done = run_sightline("tag", str(config), "--set", "actors.num_cpus=1", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return " ".join(done.stdout.split())


def check(earlier: Path, rows: int, rejected: int) -> None:
    report = verify_output(Output(str(earlier)))
    assert report.problems == []
    assert (report.rows_in, report.rows_rejected) == (rows, rejected)
    assert len(read_rows_by_id(open_output(str(earlier)))) == rows


def test_a_job_does_what_is_missing_then_what_is_new(earlier: Path) -> None:
    record = json.loads((earlier / "commits/000000-000002.json").read_text())
    for path in ["commits/000000-000002.json", *(file["path"] for file in record["files"])]:
        (earlier / path).unlink()
    kept = {path: path.read_bytes() for path in earlier.glob("[cd][oa]*/*")}
    assert "3 images in" in tag(earlier)
    check(earlier, ROWS, REJECTED)
    assert kept.items() <= {path: path.read_bytes() for path in earlier.glob("[cd][oa]*/*")}.items()
    assert "nothing to do" in tag(earlier)
    (earlier.parent / "photos/loose/new.jpg").write_bytes(make_image())
    assert "1 images in" in tag(earlier)
    assert [path.name for path in sorted((earlier / "plan").iterdir())] == ["000000.parquet", "000001.parquet"]
    check(earlier, ROWS + 1, REJECTED)


def test_rejected_rows_of_an_earlier_version_are_retried(earlier: Path, tmp_path: Path) -> None:
    tag(earlier, "--retry-rejects")
    check(earlier, ROWS, REJECTED)
    assert (earlier / "commits/000000-000001.1.json").exists()
    # The output can be retagged, and its first state was not touched.
    labels = LabelSet.model_validate({"names": LABELS, "top_k": 1})
    done = retag_output(open_output(str(earlier)), labels, str(tmp_path / "other"), RecordedProgress())
    assert (done.shards, done.rows) == (4, ROWS - REJECTED)
    check(tmp_path / "other", ROWS, REJECTED)
    shutil.rmtree(tmp_path / "other")
