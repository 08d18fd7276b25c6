"""Retagging from stored embeddings gives what a new run gives, each row once, also after kills."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset
import pytest
import yaml
from typer.testing import CliRunner

from curation.retag import count_changes, retag_output
from curation.tagged_output import open_output, read_embeddings
from pipelines.config import JobConfig, load_config
from pipelines.job import run_job
from pipelines.output.output import Output
from pipelines.upkeep.verify import verify_output
from sightline.cli import app
from sightline.demo.dataset import CONFIG, render_dataset
from siglip.checkpoints.architectures import init_checkpoint
from siglip.labels import LabelSet
from siglip.scoring import select
from storage.settings import ConfigError
from tests.support.jobs import SHARE, RecordedProgress
from tests.support.workers import choose_workers

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
DEMO: dict[str, Any] = yaml.safe_load(CONFIG.read_text())["labels"]
OTHER: dict[str, Any] = {
    **DEMO,
    "names": [*DEMO["names"][8:], "a red thing", {"name": "heart", "prompts": ["a heart", "any heart"], "accept": 0.9}],
    "threshold": 0.05,
    "top_k": 7,
    "groups": {"red or blue": ["blue circle", "a red thing"]},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retag") / "input"
    render_dataset(folder)
    return folder


def tag(images: Path, output: Path, labels: dict[str, Any] = DEMO, **keys: Any) -> JobConfig:
    config = load_config(CONFIG, {"input": str(images), "output": str(output), "labels": labels, **SHARE, **keys})
    run_job(config, RecordedProgress())
    return config


@pytest.fixture(scope="module")
def tagged(images: Path, local_ray: None) -> Path:
    output = images.parent / "tagged"
    tag(images, output)
    return output


def retag(source: Path, target: Path, labels: dict[str, Any], **more: Any) -> tuple[int, int, int]:
    done = retag_output(
        open_output(str(source)), LabelSet.model_validate(labels), str(target), RecordedProgress(), **more
    )
    return done.shards, done.rows, done.changed


def rows(output: Path, kind: str = "data") -> pa.Table:
    table = pa.dataset.dataset(output / kind).to_table()
    return table.sort_by([("source", "ascending"), ("key", "ascending"), ("row", "ascending")])


def check_verified(output: Path) -> None:
    report = verify_output(Output(str(output)))
    assert report.ok, report.problems


def test_retagging_with_the_same_label_set_changes_nothing(tagged: Path, tmp_path: Path) -> None:
    assert retag(tagged, tmp_path / "same", DEMO) == (6, 607, 0)
    assert rows(tmp_path / "same").equals(rows(tagged))
    assert rows(tmp_path / "same", "rejects").equals(rows(tagged, "rejects"))
    check_verified(tmp_path / "same")
    assert retag(tagged, tmp_path / "same", DEMO) == (0, 0, 0)


def test_retagging_gives_what_a_new_run_gives(images: Path, tagged: Path, tmp_path: Path) -> None:
    shards, count, changed = retag(tagged, tmp_path / "retagged", OTHER)
    assert (shards, count) == (6, 607)
    fresh = tag(images, tmp_path / "fresh", OTHER)
    ours, theirs, before = rows(tmp_path / "retagged"), rows(tmp_path / "fresh"), rows(tagged)
    assert ours.schema.remove_metadata().equals(theirs.schema.remove_metadata())
    assert ours["labels"].equals(theirs["labels"])
    assert ours["bands"].equals(theirs["bands"])
    assert {band for bands in ours["bands"].to_pylist() for band in bands} == {"accept", "review"}
    np.testing.assert_allclose(
        ours["scores"].combine_chunks().flatten(), theirs["scores"].combine_chunks().flatten(), atol=1e-5
    )
    said = zip(ours["labels"].to_pylist(), before["labels"].to_pylist(), strict=True)
    assert changed == sum(one != other for one, other in said) > 300
    check_verified(tmp_path / "retagged")
    # The job can continue in the retagged output: it has the same fingerprint, and nothing is new.
    outcome = run_job(fresh.model_copy(update={"output": str(tmp_path / "retagged")}), RecordedProgress())
    assert outcome.new_shards == 0
    assert outcome.manifest["rows_tagged"] == 607
    # A retagged output can be retagged again. The first label set gives the first output.
    retag(tmp_path / "retagged", tmp_path / "back", DEMO)
    assert rows(tmp_path / "back").equals(before)


def test_scores_from_float16_embeddings_differ_by_at_most_a_thousandth(images: Path, tmp_path: Path) -> None:
    tag(images, tmp_path / "half", {**DEMO, "threshold": 0, "top_k": None}, embedding_dtype="float16")
    output = open_output(str(tmp_path / "half"))
    names = output.labels.label_names()
    for batch in output.batches(["labels", "scores", "embedding"]):
        scores = output.head.scores(read_embeddings(batch))
        for row, labels, stored in zip(scores, batch["labels"].to_pylist(), batch["scores"].to_pylist(), strict=True):
            np.testing.assert_allclose(row[[names.index(name) for name in labels]], stored, atol=1e-3)


@pytest.mark.parametrize("moment", ["before the first shard", "half way"])
def test_a_killed_retag_is_finished_by_the_next(tagged: Path, tmp_path: Path, moment: str) -> None:
    (tmp_path / "labels.yaml").write_text(yaml.safe_dump(OTHER))
    target = tmp_path / "target"
    command = [sys.executable, "-m", "sightline", "retag", str(tagged), "--labels", str(tmp_path / "labels.yaml")]
    command += ["--output", str(target)]
    commits = target / "commits"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as run:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and run.poll() is None:
            if (target / "labels.parquet").exists() if moment == "before the first shard" else any(commits.glob("*")):
                break
            time.sleep(0.01)
        workers = choose_workers(psutil.Process(run.pid).children(recursive=True))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)  # a worker may still commit
    assert not alive
    before = len(list(commits.glob("*"))) if commits.exists() else 0
    with pytest.raises(ConfigError, match=r"not finished|not a finished output"):
        open_output(str(target))
    shards, _, _ = retag(tagged, target, OTHER)
    assert shards == 6 - before
    assert rows(target).num_rows == 607
    check_verified(target)


@pytest.mark.slow
def test_two_concurrent_retags_write_each_row_once(tagged: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.yaml").write_text(yaml.safe_dump(OTHER))
    target = tmp_path / "target"
    command = [sys.executable, "-m", "sightline", "retag", str(tagged), "--labels", str(tmp_path / "labels.yaml")]
    runs = [
        subprocess.Popen([*command, "--output", str(target)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    errors = [run.communicate(timeout=240)[1].decode() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    assert rows(target).num_rows == 607
    check_verified(target)
    named = {file.path for _, file in open_output(str(target)).ledger.list_files()}
    assert {str(path.relative_to(target)) for path in target.glob("[dr]*/*.parquet")} == named


def test_a_copied_output_can_be_retagged_and_a_damaged_one_cannot(tagged: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(
        tagged, copy, copy_function=shutil.copyfile
    )  # the modification times change, and with them the local ETags
    assert retag(copy, tmp_path / "same", DEMO) == (6, 607, 0)
    output = open_output(str(copy))
    assert sum(len(batch) for batch in output.batches(["key"])) == output.take(range(607), ["key"]).num_rows == 607
    damaged = copy / next(file.path for _, file in output.ledger.list_files(["data"]))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(Exception, match=r"is not the file that its shard's commit names"):
        retag(copy, tmp_path / "other", OTHER)


def test_a_second_retag_adds_only_new_and_retried_rows(images: Path, tmp_path: Path) -> None:
    """The source output gets new images and retried rejects. A second retag processes only these."""
    folder = tmp_path / "some"
    folder.mkdir()
    kept = sorted(path for path in (images / "loose").rglob("*") if path.is_file())[:30]
    assert len(kept) == 30
    for number, path in enumerate(kept[:20]):
        (folder / f"{number} {path.name}").write_bytes(path.read_bytes())
    (folder / "broken.png").write_bytes(b"none")
    tag(folder, tmp_path / "tagged", rows_per_shard=10, max_reject_fraction=1)
    retag(tmp_path / "tagged", tmp_path / "target", OTHER)
    for number, path in enumerate(kept[20:]):
        (folder / f"new {number} {path.name}").write_bytes(path.read_bytes())
    tag(folder, tmp_path / "tagged", rows_per_shard=10, max_reject_fraction=1)
    assert retag(tmp_path / "tagged", tmp_path / "target", OTHER)[:2] == (1, 10)
    (folder / "broken.png").write_bytes(kept[0].read_bytes())
    config = load_config(
        CONFIG,
        {
            "input": str(folder),
            "output": str(tmp_path / "tagged"),
            "rows_per_shard": 10,
            "on_changed": "retag",
            "max_reject_fraction": 1,
        },
    )
    run_job(config, RecordedProgress(), [])
    retag(tmp_path / "tagged", tmp_path / "target", OTHER)
    source, target = rows(tmp_path / "tagged"), rows(tmp_path / "target")
    assert source.num_rows == target.num_rows >= 31
    assert target.select(["source", "key", "row", "sha256"]).equals(source.select(["source", "key", "row", "sha256"]))
    check_verified(tmp_path / "target")


def test_wrong_arguments_are_refused_in_one_line_and_nothing_is_written(tagged: Path, tmp_path: Path) -> None:
    def refuse(*arguments: str) -> str:
        target = tmp_path / "target"
        result = CliRunner().invoke(app, ["retag", *arguments, "--output", str(target)])
        assert result.exit_code == 2, result.output
        assert not target.exists()
        [line] = result.stderr.replace("\n", " ").strip().splitlines()
        return line

    labels = tmp_path / "labels.yaml"
    labels.write_text(yaml.safe_dump({"names": ["a new label"]}))
    init_checkpoint(tmp_path / "model", "tiny", 7)
    assert "not a finished output" in refuse(str(tmp_path / "nowhere"), "--labels", str(labels))
    other = refuse(str(tagged), "--labels", str(labels), "--model", str(tmp_path / "model"))
    assert "name the checkpoint that tagged it" in other
    assert "does not exist" in refuse(str(tagged), "--labels", str(tmp_path / "none.yaml"))
    labels.write_text(yaml.safe_dump({"names": ["C", "C++"]}))
    assert "the same text to this model" in refuse(str(tagged), "--labels", str(labels))
    with pytest.raises(ConfigError, match="is the output itself"):
        retag(tagged, tagged, DEMO)
    retag(tagged, tmp_path / "one", DEMO)
    with pytest.raises(ConfigError, match="was made with other settings"):
        retag(tagged, tmp_path / "one", OTHER)


def test_only_changed_labels_or_bands_count() -> None:
    def table(labels: list[list[str]], bands: list[list[str]] | None = None) -> pa.Table:
        columns = {"labels": labels} if bands is None else {"labels": labels, "bands": bands}
        return pa.table({name: pa.array(value, pa.list_(pa.string())) for name, value in columns.items()})

    before = table([["a", "b"], [], ["c"], ["a"]])
    assert count_changes(before, before) == 0
    assert count_changes(before, table([["b", "a"], [], ["c"], ["a", "b"]])) == 2
    assert count_changes(before, table([[], ["x"], ["c"], ["b"]])) == 3
    assert count_changes(table([["a"]], [["review"]]), table([["a"]], [["accept"]])) == 1
    assert count_changes(table([["a"]]), table([["a"]], [["accept"]])) == 0


def test_stored_embeddings_give_the_stored_labels(tagged: Path) -> None:
    output = open_output(str(tagged))
    assert (output.rows, output.rejected, output.width, output.model) == (607, 5, 128, "tiny")
    ids = set()
    names, bars = output.labels.label_names(), np.asarray(output.labels.thresholds(), np.float32)
    for batch in output.batches(["id", "labels", "embedding"], rows=7):
        chosen = select(output.head.scores(read_embeddings(batch)), bars, output.labels.top_k)
        assert [[names[i] for i in row] for row, _ in chosen.rows()] == batch["labels"].to_pylist()
        ids |= set(batch["id"].to_pylist())
    assert len(ids) == 607
    assert sum(len(batch) for batch in output.rejects(["id", "reason"])) == 5
