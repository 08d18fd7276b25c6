"""The options of `sightline review`: whose answers are saved, and what is refused before the page is served."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from curation.review.answers import AnswerFile
from sightline.cli import app
from sightline.exits import USAGE
from tests.support.samples import make_sample, write_sample_files

SAMPLE = make_sample(["cat", "dog"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sample of two questions."""
    write_sample_files(tmp_path / "sample", SAMPLE, lambda _: b"thumbnail")
    return tmp_path / "sample"


def review(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["review", str(folder), *options])


def write(folder: Path, name: str, *answers: str) -> None:
    rows = [{"id": f"000000-000000/{row}", "label": ["cat", "dog"][row], "sample": "s1"} for row in range(len(answers))]
    lines = [json.dumps({**row, "answer": answer}) + "\n" for row, answer in zip(rows, answers, strict=True)]
    (folder / f"answers-{name}.jsonl").write_text("".join(lines))


def test_a_folder_without_a_sample_is_refused_in_one_plain_line(folder: Path, tmp_path: Path) -> None:
    (folder / "sample.json").unlink()
    (tmp_path / "empty").mkdir()
    for name, why in (
        ("nowhere", "does not exist: give a folder that `sightline sample` wrote"),
        ("empty", "does not hold a sample of `sightline sample`: it has no file sample.parquet"),
        ("sample", "does not hold a sample of `sightline sample`: it has no file sample.json"),
    ):
        done = review(tmp_path / name)
        assert done.exit_code == USAGE
        assert done.stderr == f"sightline: {tmp_path / name} {why}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", "a/b"], "letters, digits, - and _"),
        (["--name", ""], "choose another name"),
        (["--name", "settled"], "choose another name"),
        (["--name", "anna", "--settle"], "leave one of the two out"),
        (["--settle"], "fewer than two people"),
    ],
)
def test_options_that_mean_nothing_are_refused(folder: Path, options: list[str], message: str) -> None:
    done = review(folder, *options)
    assert done.exit_code == USAGE
    assert message in " ".join(done.output.split())
    assert sorted(path.name for path in folder.iterdir()) == ["sample.json", "sample.parquet"]


def test_a_file_in_use_is_refused_with_what_to_do(folder: Path) -> None:
    with closing(AnswerFile(folder, SAMPLE, "anna")):
        done = review(folder, "--name", "anna", "--port", "0")
    assert done.exit_code == USAGE
    assert "in use by another `sightline review`" in " ".join(done.output.split())
    assert "--name NAME" in done.output


def test_nothing_is_served_when_people_agree(folder: Path) -> None:
    write(folder, "anna", "right", "wrong")
    write(folder, "ben", "right", "unsure")
    done = review(folder, "--settle")
    assert done.exit_code == 0
    assert done.output.splitlines() == [
        "anna and ben: 1 of 1 answers are equal, Cohen's kappa is not defined",
        "disagreements: 0, settled: 0",
    ]


def test_a_store_that_does_not_answer_neither_keeps_an_answer_nor_the_command(tmp_path: Path) -> None:
    sample = make_sample(["cat"] * 4, sources=[(f"s3://bucket/{row}.jpg", "0" * 64) for row in range(4)])
    write_sample_files(tmp_path, sample, lambda _: b"thumbnail")
    command = [sys.executable, "-m", "sightline", "review", str(tmp_path), "--port", "0"]
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        keys = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **keys}) as process:
            try:
                assert process.stdout is not None
                url = process.stdout.readline().rpartition("ready: ")[2].strip()
                with httpx.Client(base_url=url, timeout=60) as client:
                    page = client.get("/api/sample").json()["review"]
                    picture = pool.submit(httpx.get, f"{url}/api/picture/{page}/0", timeout=60)
                    stack.enter_context(silent.accept()[0])  # the review reads from the store
                    answers = [{"row": 0, "answer": "right", "version": 0}]
                    saved = client.post("/api/answers", json={"review": page, "since": 0, "answers": answers})
                    assert saved.status_code == 200
                process.send_signal(signal.SIGINT)
                said, _ = process.communicate(timeout=60)  # the store's own attempts take minutes
            finally:
                process.kill()
        assert picture.result().json() == {"missing": "the review has ended"}
    assert process.returncode == 0
    assert said == f"1 of 4 answered: {tmp_path / 'answers.jsonl'}\n"
