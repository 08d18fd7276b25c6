"""`sightline tag` and `sightline verify` as a user runs them: exit codes and messages, and no messages of Ray."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from deltalake import DeltaTable
from typer.testing import CliRunner

from pipelines.output.markers import make_marker
from sightline.cli import app
from tests.support.jobs import Place, make_image, run_sightline
from tests.support.stores.radosgw import Radosgw
from tests.support.tars import make_tar
from tests.support.workers import find_decoders


def tag(config: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sightline", "tag", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def verify(output: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sightline", "verify", output, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(str(tmp_path), tmp_path)


@pytest.mark.usefixtures("local_ray")
def test_max_reject_fraction_applies_to_each_run(place: Place) -> None:
    place.put("0.png", make_image())
    place.put("bad.jpg", b"no image")
    place.put("notes.md", b"text")
    place.put("a.tar", make_tar([("x.jpg", make_image()), ("x.jxl", b"?"), ("x.heics", b"?")]))
    keys = {"max_reject_fraction": 0.05, "labels": ["cat"]}
    done = tag(place.configure(**keys))
    assert done.returncode == 3, done.stderr
    assert "33.3% of this run's images were rejected, over max_reject_fraction 5.0%" in done.stderr
    assert "skipped 3: " in done.stdout
    for said in ("1 .md files", "1 .jxl files", "1 .heics files"):
        assert said in done.stdout
    # Ray Data would warn about fewer shards than actors, and about much else.
    for word in ("UserWarning", "Warning:", "Traceback", "ray.data", "(raylet"):
        assert word not in done.stderr + done.stdout
    again = place.tag(**keys)
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True), again.stderr
    for number in range(3):
        place.put(f"later/{number}.png", make_image(number))
    clean = place.tag(**keys)
    assert clean.returncode == 0, clean.stderr
    verified = verify(place.output, "--json")
    report = json.loads(verified.stdout)
    assert verified.returncode == 0
    names = ("ok", "shards", "committed", "rows_in", "rows_tagged", "rows_rejected", "duplicates", "missing", "orphans")
    assert [report[name] for name in names] == [True, 2, 2, 6, 5, 1, 0, 0, 0]
    left = Path(place.output, "parts/000000-000000", f"{'0' * 32}.arrow")
    left.parent.mkdir(parents=True)
    left.write_bytes(b"left by a killed run")
    assert run_sightline("verify", place.output).returncode == 1
    assert json.loads(run_sightline("verify", place.output, "--json", "--remove-orphans").stdout)["ok"]


def test_a_run_that_is_to_index_its_output_does_so_and_fails_alone_if_that_fails(place: Place) -> None:
    keys = {"index": True, "labels": ["cat"]}
    place.put("0.png", make_image(0))
    first = place.tag(**keys)
    assert (first.returncode, "1 images in the index, 1 added" in first.stdout) == (0, True), first.stderr
    idle = place.tag(**keys)
    assert (idle.returncode, "in the index" in idle.stdout) == (0, False), idle.stderr
    place.put("1.png", make_image(1))
    lock = Path(place.output) / "index" / "building.json"
    lock.write_bytes(make_marker("f" * 32, "index").dump())
    failed = place.tag(**keys)
    assert failed.returncode == 1
    assert "the index was not brought up to the output: another `sightline index`" in " ".join(failed.stderr.split())
    assert "Traceback" not in failed.stderr
    assert json.loads(verify(place.output, "--json").stdout)["rows_tagged"] == 2, "what was committed stays"
    lock.unlink()
    later = place.tag(**keys)
    assert (later.returncode, "2 images in the index, 1 added" in later.stdout) == (0, True), later.stderr


@pytest.mark.usefixtures("local_ray")
def test_a_run_keeps_a_table_and_fails_alone_if_that_fails(place: Place) -> None:
    place.put("0.png", make_image(0))
    place.put("bad.jpg", b"no image")
    keys = {"labels": ["cat"], "max_reject_fraction": 1}
    plain = place.tag(**keys)
    assert (plain.returncode, "Delta" in plain.stdout) == (0, False), plain.stderr
    first = place.tag(table="delta", **keys)
    assert first.returncode == 0, first.stderr
    assert "the Delta table is up to date: 1 images; files: 2 added, 0 removed" in first.stdout
    idle = place.tag(table="delta", **keys)
    assert (idle.returncode, "Delta" in idle.stdout) == (0, False), idle.stderr
    place.put("1.png", make_image(1))
    log = Path(place.output) / "data" / "_delta_log"
    log.rename(log.with_name("_away"))
    log.write_text("no folder")
    failed = place.tag(**keys)  # an output that has a table keeps it
    assert failed.returncode == 1
    assert "the table was not brought up to the output: the Delta table" in " ".join(failed.stderr.split())
    assert "Traceback" not in failed.stderr
    log.unlink()
    log.with_name("_away").rename(log)
    assert json.loads(verify(place.output, "--json").stdout)["rows_tagged"] == 2, "what was committed stays"
    later = run_sightline("publish", place.output)
    assert (later.returncode, "the Delta table is up to date: 2 images; files: 1 added, 0 removed" in later.stdout) == (
        0,
        True,
    )
    again = run_sightline("publish", place.output)
    assert (again.returncode, "nothing to do: the table has all" in again.stdout) == (0, True)
    sources = DeltaTable(f"{place.output}/data").to_pyarrow_table()["source"].to_pylist()
    assert sorted(sources) == [f"{place.input}/{number}.png" for number in (0, 1)]


@pytest.mark.usefixtures("local_ray")
def test_labels_that_the_tokenizer_cannot_read_end_the_run_before_any_image(place: Place) -> None:
    place.put("0.png", make_image())
    refused = place.tag(labels=["red circle", "红"])
    assert refused.returncode == 2, refused.stderr
    assert "sightline: labels: '红' cannot be read, because the model's tokenizer knows none of" in refused.stderr
    assert "Traceback" not in refused.stderr
    read = place.tag(labels=["red circle", "blue 红 star"])
    assert read.returncode == 0, read.stderr
    warning = (
        "warning: the model's tokenizer does not know all characters of the prompts of 'blue 红 star': they are read"
    )
    assert warning in read.stdout + read.stderr


@pytest.mark.usefixtures("local_ray")
def test_a_broken_archive_counts_as_its_lost_images(place: Place) -> None:
    image = make_image()
    tar = make_tar((f"{n}.jpg", image) for n in range(100))
    for number in range(3):
        place.put(f"{number}.tar", tar)
    place.put("broken.tar", tar[:20_000] + b"\1" * (len(tar) - 20_000))
    done = place.tag(max_reject_fraction=0.05)
    assert done.returncode == 3, done.stdout + done.stderr
    details = {row["reason"]: row["detail"] for row in place.rows("rejects")}
    assert set(details) == {"corrupt_archive", "truncated"}  # the tar, and the image at the damage
    assert "about 99 images are lost" in details["corrupt_archive"]


@pytest.mark.slow
def test_two_concurrent_runs_write_each_row_once(place: Place) -> None:
    image = make_image()
    for number in range(12):
        place.put(f"{number:02}.tar", make_tar((f"{number:02}-{n}.jpg", image) for n in range(10)))
    command = [sys.executable, "-m", "sightline", "tag", str(place.configure(rows_per_shard=10))]
    runs = []
    for _ in range(2):
        runs.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        time.sleep(1)
    said = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    report = place.verify()
    assert report.ok, report.problems
    assert (report.rows_in, report.orphans) == (120, 0)
    assert max(place.keys_of("data").values()) == 1
    assert place.parts() == []


@pytest.mark.s3
def test_wrong_s3_settings_end_with_a_message(place: Place, s3_env: Radosgw, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = f"s3://{s3_env.new_bucket()}"
    place.put("0.png", make_image())
    for options, message in (
        (["--input", "s3://no-such-bucket-of-ours/x"], "no such bucket"),
        (["--output", "s3://no-such-bucket-of-ours/x"], "no such bucket"),
        (["--input", f"{bucket}/empty"], "no image, tar or Parquet file under"),
        (["--set", f"model.source={bucket}/model"], "no checkpoint under"),
    ):
        result = CliRunner().invoke(app, ["tag", str(place.configure()), *options])
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    # Another region makes a new client. The existing one keeps its credentials until the process ends.
    result = CliRunner().invoke(
        app, ["tag", str(place.configure()), "--output", f"{bucket}/out", "--set", "s3.region=eu-west-1"]
    )
    assert (result.exit_code, "check the credentials" in result.stderr) == (2, True), result.stderr


def test_a_run_starts_one_decoder_for_each_reader(place: Place) -> None:
    """Ray gives the next shard to any idle worker. A job of many shards once started a decoder in each worker."""
    shards, each = 60, 5
    for number in range(shards * each):
        place.put(f"{number:03d}.png", make_image(number))
    keys = {"labels": ["cat"], "rows_per_shard": each, "ray": {"readers": 2}}
    command = [sys.executable, "-m", "sightline", "tag", str(place.configure(**keys))]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    decoders: set[int] = set()
    try:
        while run.poll() is None:
            with contextlib.suppress(psutil.Error):
                below = psutil.Process(run.pid).children(recursive=True)
                decoders |= {process.pid for process in find_decoders(below)}
            time.sleep(0.1)
    finally:
        run.kill()
    said, _ = run.communicate()
    assert run.returncode == 0, said
    assert place.verify().committed == shards
    assert 1 <= len(decoders) <= 2
