"""The API of the review page: saves, conflicts between tabs, pages of other reviews, slow originals."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from curation.review import app as module
from curation.review.answers import AnswerFile, read_answer_lines
from curation.review.app import make_app
from curation.review.originals import NoPicture
from curation.sampling.files import Thumbnails, read_sample
from tests.support.samples import make_sample, write_sample_files

Use = Callable[[httpx.AsyncClient, dict[str, Any]], Awaitable[None]]


def thumbnail() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return buffer.getvalue()


class Pictures:
    """Originals whose futures a test completes."""

    def __init__(self) -> None:
        self.futures: dict[int, Future[bytes]] = {}

    def request(self, row: int) -> Future[bytes]:
        return self.futures.setdefault(row, Future())


def use(folder: Path, test: Use, pictures: Pictures | None = None, labels: tuple[str, ...] = ("a", "a", "b")) -> None:
    """Run a test against the app of a new or existing sample in `folder`."""
    if not (folder / "sample.json").exists():
        write_sample_files(folder, make_sample(labels), lambda _: thumbnail())
    table, metadata = read_sample(folder)

    async def run() -> None:
        app = make_app(table, metadata, Thumbnails(folder), pictures or Pictures(), answers)  # type: ignore[arg-type]
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:1") as client:
            await test(client, (await client.get("/api/sample")).json())

    with closing(AnswerFile(folder, table)) as answers:
        asyncio.run(run())


def body(sample: dict[str, Any], *answers: tuple[int, str, int], since: int = 0) -> dict[str, Any]:
    lines = [{"row": row, "answer": answer, "version": version} for row, answer, version in answers]
    return {"review": sample["review"], "since": since, "answers": lines}


@pytest.mark.parametrize(
    ("about", "command"),
    [
        ({"for": "audit", "excluded": ["first"]}, "audit '/made by/a test' DIR"),
        ({"for": "evaluation", "excluded": ["first"]}, "evaluate '/made by/a test' --truth DIR"),
        ({"for": "precision=0.95"}, "calibrate '/made by/a test' --truth DIR --precision 0.95"),
        (
            {"for": "precision=0.9", "excluded": ["first", "old audit", "a b.jsonl"]},
            "calibrate '/made by/a test' --truth DIR --truth first --truth 'a b.jsonl' --precision 0.9",
        ),
        ({}, "evaluate '/made by/a test' --truth DIR"),
    ],
)
def test_the_next_command_is_what_the_sample_was_drawn_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, about: dict[str, Any], command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("DIR")
    write_sample_files(folder, make_sample(["a"]), lambda _: thumbnail())
    (folder / "sample.json").write_text(json.dumps({"output": "/made by/a test", **about}))
    for earlier, purpose in (("first", "precision=0.9"), ("old audit", "audit")):
        Path(earlier).mkdir()
        Path(earlier, "sample.json").write_text(json.dumps({"for": purpose}))

    async def test(_: httpx.AsyncClient, sample: dict[str, Any]) -> None:
        assert sample["next"] == f"sightline {command}"

    use(folder, test)


def test_answers_of_one_request_are_saved_and_seen_by_other_tabs(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, sample: dict[str, Any]) -> None:
        reply = await client.post("/api/answers", json=body(sample, (0, "right", 0), (2, "wrong", 0)))
        assert reply.json() == {"version": 2, "changes": [[0, "right", 1], [2, "wrong", 2]]}
        asked = {"of": sample["review"], "since": 1}
        assert (await client.get("/api/changes", params=asked)).json()["changes"] == [[2, "wrong", 2]]
        assert (await client.get("/api/sample")).json()["answers"] == [[0, "right", 1], [2, "wrong", 2]]

    use(tmp_path, test)
    assert [row["answer"] for row in read_answer_lines(tmp_path / "answers.jsonl")[0]] == ["right", "wrong"]


def test_a_conflict_saves_nothing_and_says_what_counts(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, sample: dict[str, Any]) -> None:
        await client.post("/api/answers", json=body(sample, (0, "right", 0)))
        reply = await client.post("/api/answers", json=body(sample, (1, "right", 0), (0, "wrong", 0)))
        assert reply.status_code == 409
        assert reply.json()["conflicts"] == [[0, "right", 1]]

    use(tmp_path, test)
    assert len(read_answer_lines(tmp_path / "answers.jsonl")[0]) == 1


def test_a_page_of_another_sample_or_person_can_neither_save_nor_show_pictures(tmp_path: Path) -> None:
    pages: list[dict[str, Any]] = []

    async def remember(client: httpx.AsyncClient, sample: dict[str, Any]) -> None:
        pages.append(sample)

    async def test(client: httpx.AsyncClient, sample: dict[str, Any]) -> None:
        assert sample["review"] != pages[0]["review"]
        assert (await client.post("/api/answers", json=body(pages[0], (0, "right", 0)))).status_code == 410
        asked = {"of": pages[0]["review"], "since": 0}
        assert (await client.get("/api/changes", params=asked)).status_code == 410
        # A browser keeps pictures for a day. The same address must never mean another image.
        for kind in ("thumbnail", "picture"):
            assert (await client.get(f"/api/{kind}/{pages[0]['review']}/0")).status_code == 410
        assert (await client.get(f"/api/thumbnail/{sample['review']}/0")).content == thumbnail()

    use(tmp_path / "one", remember)
    use(tmp_path / "other", test, labels=("c", "d", "e"))
    assert (tmp_path / "other" / "answers.jsonl").read_text() == ""


def test_requests_of_other_origins_and_bad_answers_are_refused(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, sample: dict[str, Any]) -> None:
        good = body(sample, (0, "right", 0))
        assert (await client.get("/", headers={"host": "evil.test"})).status_code == 400
        evil = await client.post("/api/answers", json=good, headers={"origin": "https://evil.test"})
        assert evil.status_code == 403
        for bad, status in (
            (body(sample, (9, "right", 0)), 404),
            (body(sample, (-1, "right", 0)), 404),
            (body(sample, (0, "yes", 0)), 422),
            (body(sample, (0, "right", 0), (0, "wrong", 0)), 422),
            (body(sample), 422),
            ({**good, "more": 1}, 422),
        ):
            assert (await client.post("/api/answers", json=bad)).status_code == status
        for row in (-1, 3):
            assert (await client.get(f"/api/thumbnail/{sample['review']}/{row}")).status_code == 404
            assert (await client.get(f"/api/picture/{sample['review']}/{row}")).status_code == 404
        page = await client.get("/")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert (await client.get("/main.js")).status_code == 200

    use(tmp_path, test)
    assert (tmp_path / "answers.jsonl").read_text() == ""


def test_answers_are_saved_while_originals_are_read(tmp_path: Path) -> None:
    pictures = Pictures()

    async def test(client: httpx.AsyncClient, sample: dict[str, Any]) -> None:
        # More than the threads of the server, so that waiting in a thread would block the answer.
        path = f"/api/picture/{sample['review']}/0"
        waiting = [asyncio.create_task(client.get(path)) for _ in range(60)]
        while 0 not in pictures.futures:
            await asyncio.sleep(0)
        saved = await asyncio.wait_for(client.post("/api/answers", json=body(sample, (0, "right", 0))), 30)
        assert saved.status_code == 200
        assert not any(task.done() for task in waiting)
        pictures.futures[0].set_result(b"picture")
        assert {(await task).content for task in waiting} == {b"picture"}

    use(tmp_path, test, pictures)


def test_why_there_is_no_picture_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = Pictures()

    async def test(client: httpx.AsyncClient, sample: dict[str, Any]) -> None:
        pictures.request(0).set_exception(NoPicture("the file is gone"))
        reply = await client.get(f"/api/picture/{sample['review']}/0")
        assert (reply.json(), reply.headers["cache-control"]) == ({"missing": "the file is gone"}, "no-store")
        monkeypatch.setattr(module, "_PICTURE_SECONDS", 0.0)
        assert (await client.get(f"/api/picture/{sample['review']}/1")).status_code == 503
        pictures.futures[1].set_result(b"late")  # the request that gave up has not cancelled it
        monkeypatch.setattr(module, "_PICTURE_SECONDS", 20.0)
        assert (await client.get(f"/api/picture/{sample['review']}/1")).content == b"late"

    use(tmp_path, test, pictures)


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    async def test(client: httpx.AsyncClient, sample: dict[str, Any]) -> None:
        monkeypatch.setattr(AnswerFile, "_append", fail)
        reply = await client.post("/api/answers", json=body(sample, (0, "right", 0)))
        assert reply.status_code == 507
        assert "No space left" in reply.json()["detail"]

    use(tmp_path, test)
