"""The commands of the tour in curation/README.md, run line by line on the demo's images."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pyarrow.dataset
import pyarrow.parquet as pq

from sightline.demo.shapes import LABELS

ROOT = Path(__file__).parents[2]
SECONDS = 120
STEPS = ("demo", "sample", "review", "calibrate", "retag", "audit", "evaluate", "report")


def read_tour() -> list[str]:
    text = (ROOT / "curation" / "README.md").read_text()
    [block] = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)[:1]
    return [line for line in block.splitlines() if line]


def read_drawn(demo: Path) -> dict[str, str | None]:
    """The label that the demo drew, by the image's sha256. It is in the image's caption or in the file's name."""
    [parquet] = (demo / "input").rglob("*.parquet")
    captions = {
        hashlib.sha256(row["image"]["bytes"]).hexdigest(): row["caption"] for row in pq.read_table(parquet).to_pylist()
    }
    table = pyarrow.dataset.dataset(demo / "output" / "data").to_table(columns=["key", "sha256", "metadata"])
    said = {row["sha256"]: f"{row['metadata']} {row['key']} {captions.get(row['sha256'])}" for row in table.to_pylist()}
    return {digest: next((label for label in LABELS if label in text), None) for digest, text in said.items()}


def answer(folder: Path, sample: str, review: list[str]) -> str:
    """Start `sightline review` and answer every question with what the demo drew; one answer in thirty is false."""
    drawn = read_drawn(folder / "demo")
    rows = pq.read_table(folder / sample / "sample.parquet", columns=["sha256", "label"]).to_pylist()
    with (
        subprocess.Popen([*review, "--port", "0"], cwd=folder, stdout=subprocess.PIPE, text=True) as server,
        ExitStack() as stack,
    ):
        stack.callback(server.kill)
        assert server.stdout is not None
        url = server.stdout.readline().rpartition("ready: ")[2].strip()
        with httpx2.Client(base_url=url, timeout=60) as client:
            page = client.get("/api/sample").json()["review"]
            for index, row in enumerate(rows):
                known = drawn[row["sha256"]]
                right = (known == row["label"]) ^ (index % 30 == 7)
                said = "unsure" if known is None else "right" if right else "wrong"
                answers = [{"row": index, "answer": said, "version": 0}]
                body = {"review": page, "since": index, "answers": answers}
                assert client.post("/api/answers", json=body).status_code == 200
        server.send_signal(signal.SIGINT)
        said, _ = server.communicate(timeout=30)
    assert server.returncode == 0
    return said


def test_the_commands_of_the_tour_work(tmp_path: Path) -> None:
    printed: dict[str, list[str]] = {}
    for line in read_tour():
        command, _, target = line.partition(" > ")
        arguments = [sys.executable, "-m", "sightline", *shlex.split(command)[1:]]
        name = arguments[3]
        told = printed.setdefault(name, [])
        if name == "review":
            told.append(answer(tmp_path, arguments[4], arguments))
            continue
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
        if target:
            (tmp_path / target).write_text(done.stdout)
    counts = {name: len(told) for name, told in printed.items()}
    assert counts == {name: 2 if name in ("review", "audit") else 1 for name in STEPS}

    # Which labels are calibrated depends on which answers are false, and so on the processor.
    [calibrated] = printed["calibrate"]
    count = re.search(r"(\d+) of 64 labels calibrated", calibrated)
    assert count
    assert int(count[1]) >= 5
    assert "accepted at >= 70%" in calibrated
    assert "607 images are in" in printed["retag"][0]
    table = pyarrow.dataset.dataset(tmp_path / "demo" / "calibrated" / "data").to_table()
    bands = Counter(band for row in table["bands"].to_pylist() for band in row)
    assert bands["accept"] > 20
    assert bands.keys() <= {"accept", "review"}

    drawn, result = printed["audit"]
    assert "Then: sightline audit demo/calibrated audit" in drawn
    sentences = re.findall(r"^[a-z ]+: (\d+) accepted, .*\b(\d\.\d\d) right", result, re.MULTILINE)
    assert len(sentences) >= 5
    images = sum(int(accepted) for accepted, _ in sentences)
    assert images > 20
    assert sum(int(accepted) * float(right) for accepted, right in sentences) / images > 0.7

    told = json.loads(printed["evaluate"][0])
    assert told["accepted"]["images"] == bands["accept"]
    precision = told["accepted"]["precision"]
    assert 0.7 < precision["low"] <= precision["value"] <= precision["high"]

    page = (tmp_path / "report.html").read_text()
    assert page.count('<li class="done">') == 7  # tagged, sampled, reviewed, calibrated, retagged, evaluated, audited
    assert f'<p class="number">{bands["accept"]:,} <small>labels' in page
    assert f"{precision['value']:.2f}" in page
    assert 'class="accept"' in page
