"""Status and preview of an output: finished, under way, without a manifest; and the commands that show and keep it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from typer.testing import CliRunner, Result

from pipelines.config import JobConfig, load_config
from pipelines.output import state as state_module
from pipelines.output.fingerprint import claim_output, make_fingerprint
from pipelines.output.output import Output
from pipelines.output.state import read_state
from pipelines.planning.plan import read_plan
from pipelines.preparation import extend_plan
from pipelines.preview import preview_run
from sightline import api
from sightline.cli import app
from siglip.checkpoint import pin_model
from storage.settings import ConfigError
from storage.store import StoreError
from tests.support.growing_output import GrowingOutput, Run
from tests.support.jobs import RecordedProgress, make_parquet


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"})


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def growing(tmp_path: Path) -> GrowingOutput:
    made = GrowingOutput(tmp_path / "output")
    made.grow(4, rejected=[1])
    return made


def test_the_status_of_a_finished_output(growing: GrowingOutput) -> None:
    status = api.status(growing.root)
    assert (status.planned, status.committed) == (4, 4)
    assert (status.rows_in, status.rows_tagged, status.rows_rejected) == (12, 8, 4)
    assert status.reasons == {"corrupt": 4}
    assert (status.waiting, status.examples, status.under_way) == ({}, {}, [])
    assert len(status.runs) == 1
    growing.retry()
    assert api.status(str(growing.root) + "/").reasons == {}
    assert len(api.status(growing.root).runs) == 2


def test_the_status_of_an_output_under_way(growing: GrowingOutput) -> None:
    growing.plan(3)
    run = growing.run()
    one, two, _ = run.state.list_pending()
    run.commit(one, [0, 1])
    run.state.ledger.seal()
    run.commit(two, add=False)  # in no ledger yet
    status = api.status(growing.root)
    assert (status.planned, status.committed, status.rows_in) == (7, 6, 18)
    assert status.reasons == {"corrupt": 6}
    assert len(status.under_way) == 1
    for ref in run.retries():
        run.retry(ref)
    run.state.ledger.seal()
    assert api.status(growing.root).reasons == {}
    result = invoke("status", str(growing.root))
    assert result.exit_code == 0
    assert "at work a run since" in " ".join(result.stdout.split())
    assert json.loads(invoke("status", str(growing.root), "--json").stdout)["committed"] == 6


def test_the_status_without_a_manifest(growing: GrowingOutput) -> None:
    """The first run is under way, or was killed."""
    (growing.root / "manifest.json").unlink()
    status = api.status(growing.root)
    assert (status.planned, status.committed, status.rows_in, status.rows_rejected) == (4, 4, 12, 4)
    assert status.runs == []
    assert invoke("status", str(growing.root)).exit_code == 0


def test_the_status_of_a_damaged_manifest(growing: GrowingOutput) -> None:
    (growing.root / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"manifest\.json is not JSON"):
        api.status(growing.root)
    result = invoke("status", str(growing.root))
    assert (result.exit_code, len(result.stderr.strip().splitlines())) == (1, 1)


def test_what_waits_is_counted_with_examples(growing: GrowingOutput) -> None:
    run = growing.run()
    waiting = [{"name": str(n), "reason": "missing", "detail": f"[{n}] is gone", "rows": 1} for n in range(5)]
    run.state.finish(run.fingerprint, {}, [*waiting, {**waiting[0], "reason": "changed"}])
    status = api.status(growing.root)
    assert status.waiting == {"missing": 5, "changed": 1}
    assert status.examples == {"missing": ["[0] is gone", "[1] is gone", "[2] is gone"], "changed": ["[0] is gone"]}
    assert "missing 5, such as [0] is gone; [1] is gone; [2] is gone" in invoke("status", str(growing.root)).stdout


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """The YAML file of a job over seven images, of which three are a shard."""
    (tmp_path / "input").mkdir()
    for number in range(7):
        (tmp_path / f"input/{number}.jpg").write_bytes(b"not decoded here")
    path = tmp_path / "job.yaml"
    keys = {"input": str(tmp_path / "input"), "output": str(tmp_path / "tagged"), "labels": ["cat", "dog"]}
    path.write_text(yaml.safe_dump({**keys, "rows_per_shard": 3, "cost": {"per_hour": 3}}))
    return path


def commit_some(config: JobConfig, count: int, images_per_second: float | None) -> None:
    """Do what a run does, without images, and stop after some shards."""
    output = Output(config.output)
    plan, _, writer, fingerprint = extend_plan(config, output, pin_model(config.model))
    run = Run(read_state(output, plan), writer, fingerprint)
    for ref in list(run.state.list_pending())[:count]:
        run.commit(ref, range(ref.rows), add=images_per_second is not None)
    if images_per_second is not None:
        rate = {"images_per_second": images_per_second, "limited_by": "model", "rows": 3, "started_at": "x"}
        run.state.finish(fingerprint, rate, [])


def preview(job: Path, **keys: Any) -> Any:
    return preview_run(load_config(job, keys), RecordedProgress())


def test_the_preview_of_a_new_output_writes_nothing(job: Path, tmp_path: Path) -> None:
    found = preview(job)
    assert (found.new_inputs, found.new_shards, found.new_images) == (7, 3, 7)
    assert (found.known_inputs, found.shards, found.images) == (0, 3, 7)
    assert (found.images_per_second, found.hours, found.cost, found.limited_by) == (None, None, None, None)
    assert not (tmp_path / "tagged").exists()
    result = invoke("plan", str(job))
    assert result.exit_code == 0
    assert "no run of this output has ended" in result.stdout
    assert not (tmp_path / "tagged").exists()


def test_the_preview_tells_what_is_no_input(job: Path, tmp_path: Path) -> None:
    (tmp_path / "input/notes.md").write_text("")
    (tmp_path / "list.txt").write_text("input/0.jpg\n")
    found = preview(job, input=[str(tmp_path / "input"), str(tmp_path / "list.txt")])
    assert found.known_inputs == 0  # nothing is planned, also what a list and a folder name
    assert found.skipped == {".md files": 1, "images that a list names too": 1}
    assert json.loads(invoke("plan", str(job), "--json").stdout)["skipped"] == {".md files": 1}
    assert "skipped 1: 1 .md files (" in invoke("plan", str(job)).stdout


def test_the_preview_tells_of_days_without_a_folder(job: Path, tmp_path: Path) -> None:
    commit_some(load_config(job), 1, 1.0)
    day = str(tmp_path / "input/dt={date}")
    result = invoke("plan", str(job), "--input", day, "--date", "2026-12-01", "--date", "2026-12-02")
    assert result.exit_code == 0, result.stderr
    assert "skipped 2: 2 inputs that do not exist (" in result.stdout
    assert "nothing is under" in result.stderr
    assert "dt=2026-12-02 now" in " ".join(result.stderr.split())


def test_the_preview_of_an_output_that_is_begun(job: Path, tmp_path: Path) -> None:
    commit_some(load_config(job), 2, 0.001)
    (tmp_path / "input/new.jpg").write_bytes(b"x")
    before = snapshot(tmp_path / "tagged")
    found = preview(job)
    assert (found.new_inputs, found.new_shards, found.new_images, found.known_inputs) == (1, 1, 1, 7)
    assert (found.shards, found.images) == (2, 2)
    assert (found.images_per_second, found.hours, found.cost) == (0.001, 0.5556, 1.67)
    assert found.limited_by == "model"
    result = invoke("plan", str(job), "--json")
    assert json.loads(result.stdout) == found.as_dict()
    assert "about 33 minutes at 0.001 images/s, limited by model" in invoke("plan", str(job)).stdout
    assert snapshot(tmp_path / "tagged") == before


def test_the_preview_counts_what_a_killed_run_has_committed(job: Path, tmp_path: Path) -> None:
    commit_some(load_config(job), 2, None)
    before = snapshot(tmp_path / "tagged")
    found = preview(job)
    assert (found.new_inputs, found.shards, found.images) == (0, 1, 1)
    assert snapshot(tmp_path / "tagged") == before
    assert (api.status(tmp_path / "tagged").planned, len(api.status(tmp_path / "tagged").under_way)) == (3, 1)


def test_the_preview_names_what_waits(job: Path, tmp_path: Path) -> None:
    commit_some(load_config(job), 3, 1.0)
    (tmp_path / "input/0.jpg").write_bytes(b"changed")
    found = preview(job)
    assert [item.reason for item in found.waiting] == ["changed"]
    result = invoke("plan", str(job))
    assert "waits:" in result.stderr
    assert "0.jpg changed since it was planned" in result.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["labels=[cat]"], "labels.names"),
        (["embedding_dtype=float16"], "embedding_dtype"),
        (["parquet.columns={a: a}"], "parquet.columns"),
    ],
)
def test_the_preview_refuses_what_a_run_refuses(job: Path, settings: list[str], message: str) -> None:
    commit_some(load_config(job), 1, 1.0)
    result = invoke("plan", str(job), *(word for one in settings for word in ("--set", one)))
    assert result.exit_code == 2, result.stdout
    assert message in result.stderr.strip().splitlines()[-1]


def test_the_preview_refuses_labels_that_the_model_cannot_read(job: Path) -> None:
    result = invoke("plan", str(job), "--set", "labels=[cat, \u72ac]")
    assert result.exit_code == 2, result.output
    assert "cannot be read" in result.stderr


def test_a_slow_run_is_in_the_status_before_its_end(growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    growing.plan(2)
    before = api.status(growing.root).committed
    run = growing.run()
    run.state.announce({0})
    monkeypatch.setattr(state_module, "SEAL_SECONDS", 0)
    run.commit(next(iter(run.state.list_pending())))
    assert api.status(growing.root).committed == before + 1


def test_the_preview_knows_the_passed_columns(tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    (tmp_path / "input/a.parquet").write_bytes(make_parquet({"image": [b"x"] * 3, "n": [1, 2, 3]}))
    keys: dict[str, Any] = {"input": str(tmp_path / "input"), "output": str(tmp_path / "tagged"), "labels": ["cat"]}
    config = JobConfig(**keys, parquet={"columns": {"n": "n"}})
    assert preview_run(config, RecordedProgress()).new_images == 3
    assert not (tmp_path / "tagged").exists()
    extend_plan(config, Output(config.output), pin_model(config.model))
    assert preview_run(config, RecordedProgress()).known_inputs == 1
    with pytest.raises(ConfigError, match=r"parquet\.columns"):
        preview_run(JobConfig(**keys), RecordedProgress())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status", "{none}"], "is no output of `sightline tag`"),
        (["status", "{folder}"], "is no output of `sightline tag`"),
        (["status", ""], "the path '' is empty"),
        (["compact", "{none}"], "no output of `sightline tag`"),
        (["compact", "{folder}"], "no output of `sightline tag`"),
        (["upgrade", "{none}"], "no output of `sightline tag`"),
        (["upgrade", "{folder}"], "no output of `sightline tag`"),
        (["verify", "{none}", "--since", "today"], "no output of `sightline tag`"),
        (["verify", "{output}", "--since", "tomorrow"], "tomorrow is no day"),
        (["verify", "{output}", "--since", "2026-02-30"], "2026-02-30 is no day"),
        (["verify", "{output}", "--since", ""], "is no day"),
        (["verify", "{output}", "--since", "today", "--remove-orphans"], "leave --since out"),
        (["plan", "{none}"], "no such file"),
        (["plan", "{job}", "--input", "{none}"], "does not exist"),
        (["plan", "{job}", "--set", "x=1"], "unknown key x"),
        (["plan", "{job}", "--set", "model.source={none}"], "{none}"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    growing: GrowingOutput, job: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    names = {"none": str(tmp_path / "none"), "folder": str(tmp_path), "output": str(growing.root), "job": str(job)}
    result = invoke(*(word.format(**names) for word in words))
    assert result.exit_code == 2, result.stdout + result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("sightline: ")
    assert message.format(**names) in last
    assert "Traceback" not in result.output


def test_verify_since_a_day(growing: GrowingOutput) -> None:
    for day, rows in (("today", 12), ("yesterday", 12), ("2020-01-01", 12)):
        result = invoke("verify", str(growing.root), "--since", day, "--json")
        assert (result.exit_code, json.loads(result.stdout)["rows_in"]) == (0, rows), day
    [path, *_] = (growing.root / "data").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert invoke("verify", str(growing.root), "--since", "yesterday").exit_code == 1
    result = invoke("verify", str(growing.root), "--since", "2999-01-01")
    assert (result.exit_code, "has not begun" in result.stderr) == (2, True)


def test_compact_says_what_it_did(growing: GrowingOutput) -> None:
    growing.grow(4, rejected=[1])
    result = invoke("compact", str(growing.root))
    assert result.exit_code == 0, result.stderr
    assert "16 files before, 2 now;" in result.stdout
    assert invoke("compact", str(growing.root)).stdout.startswith("2 files before, 2 now; 0.0 MB were written")
    assert json.loads(invoke("verify", str(growing.root), "--json").stdout)["ok"]


def test_upgrade_of_a_current_output_changes_nothing(growing: GrowingOutput) -> None:
    before = snapshot(growing.root)
    assert "has 4 committed shards" in invoke("upgrade", str(growing.root)).stdout
    assert snapshot(growing.root) == before


def test_an_output_that_another_job_has_claimed(job: Path) -> None:
    """Nothing is planned there yet."""
    config = load_config(job)
    other = config.model_copy(update={"embedding_dtype": "float16"})
    claim_output(Output(config.output), make_fingerprint(other, pin_model(config.model), pa.schema([])))
    with pytest.raises(ConfigError, match="embedding_dtype"):
        preview(job)


def test_the_time_is_estimated_from_several_runs(job: Path, tmp_path: Path) -> None:
    """A night with two images has a low rate, and took as long besides as any other."""
    config = load_config(job)
    commit_some(config, 1, None)
    growing = read_state(Output(config.output), read_plan(Output(config.output)))
    large = {"rows": 10_000, "images_per_second": 100.0, "hours": 110 / 3600, "started_at": "2026-01-01T00:00:00"}
    growing.finish(growing.read_manifest().get("fingerprint", {}), large, [])
    small = {"rows": 2, "images_per_second": 0.5, "hours": 14 / 3600, "started_at": "2026-01-02T00:00:00"}
    growing.finish(growing.read_manifest()["fingerprint"], small, [])
    found = preview(job)
    assert found.images_per_second == pytest.approx(10_002 / 104)
    assert found.hours is not None
    assert 3600 * found.hours == pytest.approx(found.images / found.images_per_second + 10, abs=0.5)


def test_a_damaged_manifest_is_written_anew(growing: GrowingOutput) -> None:
    growing.root.joinpath("manifest.json").write_text("{")
    state = read_state(growing.output, read_plan(growing.output))
    assert state.read_manifest() == {}
    state.renew({})
    assert api.status(growing.root).committed == 4
