"""The page when an output cannot be read, when another one takes its place, and with columns of any name and type."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from benchmarks.outputs import SyntheticOutput, write_output
from curation.browse import copy as copy_module
from curation.browse.actions import Export
from curation.browse.app import make_app
from curation.browse.copy import LocalCopy
from curation.browse.follow import Follower
from curation.browse.query import Embedder
from curation.browse.snapshot import Snapshot
from curation.quality.truth_files import read_truth_file
from curation.tagged_output import TaggedOutput, open_output
from pipelines.output.output import MANIFEST
from siglip.labels import LabelSet
from storage.settings import ConfigError
from storage.store import StoreError
from tests.support.growing_output import GrowingOutput
from tests.support.vectors import draw_vectors

NAMES = ["cat", "dog"]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_module, "ROWS", 64)


def make(root: Path, rows: tuple[int, ...] = (100, 100, 100, 100), width: int = 16, **more: Any) -> TaggedOutput:
    made = SyntheticOutput(
        LabelSet.model_validate({"names": NAMES, "threshold": 1e-4}),
        draw_vectors(len(NAMES), width, 1),
        len(rows),
        lambda shard: draw_vectors(rows[shard], width, 10 + shard),
        **more,
    )
    write_output(str(root), made)
    return open_output(str(root))


def test_a_file_that_cannot_be_read_costs_its_shard_and_nothing_more_at_each_attempt(tmp_path: Path) -> None:
    output = make(tmp_path / "made")
    [third] = (tmp_path / "made" / "data").glob("000000-000002-*")
    whole = third.read_bytes()
    third.write_bytes(whole[: len(whole) // 2])
    (folder := tmp_path / "copy").mkdir()
    copy, found = LocalCopy(folder), list[Snapshot]()
    rows = set()
    for _ in range(4):
        with pytest.raises(StoreError):
            copy.update(output, found.append)
        rows.add(len(copy._live))
    assert len(rows) == 1  # a second attempt adds nothing, neither to the memory nor to the disk
    assert list(folder.iterdir()) == []
    third.write_bytes(whole)
    copy.update(output, found.append)
    live = np.flatnonzero(found[-1].live)
    assert sorted(found[-1].take(live, ["id"])["id"].to_pylist()) == sorted(output.to_arrow(["id"])["id"].to_pylist())


def test_a_disk_that_takes_no_more_is_said_and_gets_no_file(tmp_path: Path) -> None:
    output = make(tmp_path / "made", thumbnail=lambda row: bytes(4000))
    (folder := tmp_path / "copy").mkdir()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(ConfigError, match="cannot be written"):
            LocalCopy(folder).update(output, lambda snapshot: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(folder.iterdir()) == []


class Page:
    """A client of the page's API, which waits for changes of an output."""

    def __init__(self, output: TaggedOutput, folder: Path) -> None:
        (folder / "copy").mkdir()
        self.told: list[str] = []
        self.answers = folder / "answers.jsonl"
        self.follower = Follower(output, folder / "copy", 0.02, self.told.append)
        self.follower.start()
        app = make_app(self.follower, Embedder(None), self.answers)
        self.client = TestClient(app, base_url="http://127.0.0.1:1")
        self.wait(lambda about: about["as_of"] is not None)

    def close(self) -> None:
        self.client.close()
        self.follower.close()

    def wait(self, ready: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until `/api/about` is as wanted, and keep it in `about`."""
        end = time.monotonic() + 60
        while not ready(about := self.client.get("/api/about").json()):
            assert time.monotonic() < end, about
            time.sleep(0.01)
        self.about = about

    def post(self, name: str, body: Any, run: str = "") -> Any:
        return self.client.post(f"/api/{name}/{run or self.about['run']}", json=body)


def test_another_output_in_the_same_place_is_another_run_of_the_page(tmp_path: Path) -> None:
    """Its images have the same positions and ids, and must not be taken for those that were selected before."""
    with closing(Page(make(tmp_path / "made"), tmp_path)) as page:
        before = page.about["run"]
        assert page.post("list", {"positions": [3]}).status_code == 200
        shutil.rmtree(tmp_path / "made")
        make(tmp_path / "made", (70,), 8, weights="another model", key="other {:08d}".format)
        page.wait(lambda about: about["run"] != before and about["as_of"] is not None)
        assert page.about["wanted"] == page.about["copied"] == 70
        for name, body in (
            ("list", {"positions": [3]}),
            ("answers", {"positions": [3], "label": "cat", "answer": "right"}),
            ("export", {"positions": [3], "target": "hf", "destination": str(tmp_path / "out")}),
            ("search", {}),
        ):
            assert page.post(name, body, before).status_code == 410
        assert not page.answers.exists()
        for asked in ({"texts": ["cat"], "cutoff": "none"}, {"like": [3]}, {"labels": [{"label": "dog", "min": 0}]}):
            found = page.post("search", asked)
            assert found.status_code == 200
            assert all(row["key"].startswith("other") for row in found.json()["rows"])
        assert page.client.get(f"/api/image/{page.about['run']}/3").json()["values"]["key"] == "other 00000003"


def test_a_problem_is_told_once_and_no_longer_when_it_is_over(tmp_path: Path) -> None:
    with closing(Page(make(tmp_path / "made"), tmp_path)) as page:
        manifest = tmp_path / "made" / MANIFEST
        content = manifest.read_bytes()
        manifest.unlink()
        page.wait(lambda about: about["problem"] != "")
        time.sleep(0.2)  # some more attempts
        assert [line for line in page.told if "not up to date" in line] == [page.told[-1]]
        assert page.post("search", {}).json()["count"] == 400
        manifest.write_bytes(content)
        page.wait(lambda about: about["problem"] == "")


def test_an_error_that_nobody_expected_is_told_and_the_page_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = GrowingOutput(tmp_path / "made")
    growing.grow(1, 30)
    with closing(Page(open_output(str(growing.root)), tmp_path)) as page:
        monkeypatch.setattr(LocalCopy, "update", lambda *arguments: [][1])
        growing.grow(1, 30)
        page.wait(lambda about: "IndexError" in about["problem"])
        monkeypatch.undo()
        page.wait(lambda about: about["problem"] == "" and about["copied"] == 60)


def test_selected_images_are_found_again_when_their_shards_were_replaced(tmp_path: Path) -> None:
    growing = GrowingOutput(tmp_path / "made")
    growing.grow(2, 70, rejected={5, 6})
    with closing(Page(open_output(str(growing.root)), tmp_path)) as page:
        chosen = [0, 5, 100]
        before = page.post("list", {"positions": chosen}).text
        growing.retry(still={6})
        page.wait(lambda about: about["copied"] == 2 * 69 and about["as_of"] is not None)
        now = page.post("moved", {"positions": chosen}).json()
        live = page.follower.snapshot.live
        assert all(live[position] for position in now)
        assert not any(live[position] for position in chosen)
        assert page.post("list", {"positions": now}).text == before
        # An image that is selected at both of its positions is one image.
        assert page.post("list", {"positions": [*chosen, *now]}).text == before
        said = page.post("answers", {"positions": [*chosen, *now], "label": "cat", "answer": "right"}).json()
        assert said["saved"] == len(read_truth_file(page.answers).rows) == 3


def test_columns_of_any_name_and_type_are_shown_and_searched(tmp_path: Path) -> None:
    passed = pa.schema(
        [
            (":shard", pa.int64()),
            ("id", pa.int64()),
            ("large", pa.uint64()),
            ("far", pa.timestamp("s")),
            ("fine", pa.timestamp("ns")),
            ("fars", pa.list_(pa.date32())),
            ("Key", pa.int64()),
        ]
    )

    def values(rows: range) -> dict[str, Any]:
        count = len(rows)
        return {
            ":shard": list(rows),
            "id": [7 * row for row in rows],
            "large": pa.array([2**63 + row for row in rows], pa.uint64()),
            "far": pa.array([10**12] * count, pa.int64()).view(pa.timestamp("s")),
            "fine": pa.array([1] * count, pa.int64()).view(pa.timestamp("ns")),
            "fars": pa.array([[10**7]] * count, pa.list_(pa.int32())).cast(pa.list_(pa.date32())),
            "Key": list(rows),
        }

    with closing(Page(make(tmp_path / "made", (30, 30), passed=passed, values=values), tmp_path)) as page:
        shown = page.client.get(f"/api/image/{page.about['run']}/33")
        assert shown.status_code == 200
        row = shown.json()["values"]
        assert (row["id"], row["input_id"], row[":shard"]) == ("000000-000001/3", 7 * 33, 33)
        assert row["large"] == str(2**63 + 33)  # as a number, a page would round it
        assert row["fine"] == "1970-01-01 00:00:00.000000001"
        assert "out of range" in row["far"] or "33658" in row["far"]
        assert "cannot be shown" in row["fars"]
        for condition in ('":shard" = 33', "Key = 33", "key = 'image 00000033'", "input_id = 231"):
            found = page.post("search", {"where": condition}).json()
            assert [one["key"] for one in found["rows"]] == ["image 00000033"], condition


@pytest.mark.parametrize(
    ("destination", "says"),
    [("~nobody-of-this-name/x", "no such home"), ("a\0b", "cannot be seen"), ("a\nb", "cannot be seen"), (" ", "name")],
)
def test_a_destination_that_can_be_no_folder_is_refused(
    tmp_path: Path, destination: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with closing(Page(make(tmp_path / "made", (5,)), tmp_path)) as page:
        refused = page.post("export", {"positions": [1], "target": "hf", "destination": destination})
        assert refused.status_code == 422
        assert says in refused.json()["detail"]
        assert page.client.get("/api/export").json()["state"] == "none"
        empty = page.client.post(f"/api/export/{page.about['run']}", headers={"content-type": "application/json"})
        assert empty.json()["detail"].startswith("the request: ")


def test_an_export_is_cancelled_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update, asked = Export.update, threading.Event()

    def wait(export: Export, rows: int) -> None:
        assert asked.wait(60)
        update(export, rows)

    monkeypatch.setattr(Export, "update", wait)
    with closing(Page(make(tmp_path / "made", (5,)), tmp_path)) as page:
        body = {"positions": [1, 3], "target": "hf", "destination": str(tmp_path / "out")}
        page.post("export", body)
        again = page.post("export", body)
        assert (again.status_code, "or cancel it" in again.json()["detail"]) == (422, True)
        assert page.client.delete("/api/export").json()["state"] == "running"
        asked.set()
        while (said := page.client.get("/api/export").json())["state"] == "running":
            time.sleep(0.01)
        assert (said["state"], said["lines"]) == ("cancelled", ["cancelled: nothing was written"])
        assert not (tmp_path / "out").exists()
        page.post("export", body)
        while (said := page.client.get("/api/export").json())["state"] == "running":
            time.sleep(0.01)
        assert (said["state"], said["rows"]) == ("done", 2)


def test_an_answer_that_is_taken_back_leaves_the_one_before_it(tmp_path: Path) -> None:
    """Someone says right of many images, then wrong of one of them by mistake, and presses Undo."""
    with closing(Page(make(tmp_path / "made", (5,)), tmp_path)) as page:
        label = next(iter(page.about["thresholds"]))
        for positions, answer in (([1, 2], "right"), ([2, 3], "wrong"), ([2, 3], "taken back")):
            said = page.post("answers", {"positions": positions, "label": label, "answer": answer}).json()
        read = read_truth_file(Path(said["file"]))
        assert [row.answer for row in read.rows] == ["right", "right"]
        ids = page.post("list", {"positions": [1, 2]}).text.splitlines()
        assert sorted(row.image for row in read.rows) == sorted(ids)
        said = page.post("answers", {"positions": [1], "label": label, "answer": "taken back"}).json()
        assert [row.image for row in read_truth_file(Path(said["file"])).rows] == [ids[1]]


def test_an_export_to_a_url_makes_no_folder_of_this_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with closing(Page(make(tmp_path / "made", (5,)), tmp_path)) as page:
        page.post("export", {"positions": [1], "target": "hf", "destination": "s3://bucket/photos"})
        while (said := page.client.get("/api/export").json())["state"] == "running":
            time.sleep(0.01)
        assert said["state"] == "failed"
        assert "local path" in said["lines"][0]
        assert not (tmp_path / "s3:").exists()


def test_an_upload_that_is_too_large_is_not_held(tmp_path: Path) -> None:
    with closing(Page(make(tmp_path / "made", (5,)), tmp_path)) as page:
        part, sent, status = bytes(2**22), 0, list[int]()

        async def receive() -> dict[str, Any]:
            nonlocal sent
            sent += len(part)
            return {"type": "http.request", "body": part, "more_body": sent < 2**28}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])

        async def upload() -> None:
            await page.client.app(scope, receive, send)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": f"/api/upload/{page.about['run']}", "raw_path": b"", "query_string": b"", "root_path": "",
            "headers": [(b"host", b"127.0.0.1:1")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 1),
        }  # fmt: skip
        tracemalloc.start()
        try:
            asyncio.run(upload())
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert status == [413]
        assert sent == 2**28
        assert peak < 2**27


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--copy-to", "/proc"], "--copy-to"),
        (["--answers", "/nowhere/answers.jsonl"], "--answers"),
        (["--answers", "."], "--answers"),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_the_page_opens(
    tmp_path: Path, options: list[str], says: str
) -> None:
    make(tmp_path / "made", (5,))
    command = [sys.executable, "-m", "sightline", "browse", str(tmp_path / "made"), "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGTERM, 143), (signal.SIGINT, 0)])
def test_the_copy_is_gone_however_the_command_is_ended(tmp_path: Path, number: int, code: int) -> None:
    make(tmp_path / "made", (5,))
    (folder := tmp_path / "copy").mkdir()
    command = [sys.executable, "-m", "sightline", "browse", str(tmp_path / "made"), "--port", "0"]
    with subprocess.Popen(
        [*command, "--copy-to", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().rpartition("ready: ")[2].strip()
            assert httpx.get(f"{url}api/about", timeout=60).status_code == 200
            assert os.listdir(folder)
            process.send_signal(number)
            assert process.wait(120) == code
        finally:
            process.kill()
    assert os.listdir(folder) == []
