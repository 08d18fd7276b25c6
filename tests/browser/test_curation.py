"""The review page and the report, in a real Chromium: by keyboard, on a phone, with a thousand labels."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from benchmarks.outputs import SyntheticOutput, write_output
from curation.quality.truth import read_truth
from curation.report.page import write_report
from curation.report.statistics import compute_statistics
from curation.review.labelstudio import write_tasks
from curation.sampling.files import read_questions, read_sample, write_sample
from curation.sampling.sample import draw_sample
from curation.tagged_output import TaggedOutput, open_output
from siglip.labels import LabelSet
from siglip.scoring import Scale
from tests.support.chromium import Browser
from tests.support.vectors import draw_vectors

pytestmark = pytest.mark.browser
PHONE = (360, 740)
WIDTH = 16


def picture(row: int) -> bytes:
    buffer = io.BytesIO()
    colour = tuple(np.random.default_rng(row).integers(0, 256, 3).tolist())
    Image.new("RGB", (120 + row % 60, 160 - row % 50), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def make(root: Path, labels: int) -> TaggedOutput:
    names = [f"label {row}" for row in range(labels - 1)] + ["<b>bold</b> & 'quoted'"]
    made = SyntheticOutput(
        LabelSet.model_validate({"names": names, "threshold": 0.1, "top_k": 3}),
        draw_vectors(labels, WIDTH, 5),
        2,
        lambda shard: draw_vectors(300, WIDTH, shard),
        scale=Scale(20, -8),
        thumbnail=picture,
        reject=lambda shard: ["truncated"] * shard,
    )
    write_output(str(root), made)
    return open_output(str(root))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    return make(tmp_path_factory.mktemp("curation") / "made", 3)


@contextmanager
def review(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `sightline review` on a free port. Yields its URL and its process, and kills the process in the end."""
    command = [sys.executable, "-m", "sightline", "review", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().rpartition("ready: ")[2].strip(), process
        finally:
            process.kill()


def shown(browser: Browser) -> str:
    """The src of the image that is shown, after it has loaded."""
    browser.wait("document.getElementById('image').complete && document.getElementById('image').naturalWidth")
    return str(browser.run("document.getElementById('image').getAttribute('src')"))


def press(browser: Browser, key: str) -> str:
    before = shown(browser)
    ActionChains(browser.driver).send_keys(key).perform()
    gone = "document.getElementById('work').hidden"
    browser.wait(f"{gone} || document.getElementById('image').getAttribute('src') !== arguments[0]", before)
    return before


def read_lines(folder: Path, count: int) -> list[dict[str, object]]:
    path = folder / "answers.jsonl"
    for _ in range(200):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if len(lines) >= count:
            return lines
        time.sleep(0.02)
    raise AssertionError(f"{len(lines)} answers of {count}")


def test_answers_by_keyboard_survive_a_kill_of_the_server(
    browser: Browser, output: TaggedOutput, tmp_path: Path
) -> None:
    folder = tmp_path / "sample"
    write_sample(output, draw_sample(output, 10), folder, 0)
    table, _ = read_sample(folder)
    with review(folder) as (url, process):
        browser.open(url)
        shown_before = [press(browser, key) for key in (Keys.ARROW_RIGHT, "w", Keys.ARROW_DOWN, "R")]
        assert shown_before == [f"/api/image/{row}" for row in range(4)]
        assert shown(browser) == "/api/image/4"
        press(browser, Keys.BACKSPACE)
        assert shown(browser) == "/api/image/3"
        press(browser, Keys.ARROW_LEFT)
        lines = read_lines(folder, 6)
        assert [line["answer"] for line in lines] == ["right", "wrong", "unsure", "right", "taken back", "wrong"]
        assert lines[0].keys() == {"id", "key", "sha256", "label", "weight", "score", "answer"}
        assert {line["id"] for line in lines[3:]} == {table["id"][3].as_py()}
        assert browser.find("#count").text == f"4 of {table.num_rows}"
        assert [one for one in browser.requests() if not one.startswith((url, "data:"))] == []
        assert browser.complaints() == []
        process.kill()
        process.wait()
        # The page keeps running without its server. It reports an answer that it could not save, and asks again.
        ActionChains(browser.driver).send_keys("r").perform()
        browser.wait("!document.getElementById('trouble').hidden")
        assert "Not saved" in browser.find("#trouble").text
    with (folder / "answers.jsonl").open("a") as file:
        file.write('{"id": "half a li')  # what a process killed in the middle of a write leaves
    with review(folder) as (url, process):
        browser.open(url)
        assert shown(browser) == "/api/image/4"
        for _ in range(table.num_rows - 4):
            press(browser, "r")
        browser.wait("!document.getElementById('done').hidden")
        assert "All questions are answered" in browser.find("#done-title").text
        assert "sightline calibrate" in browser.find("#next").text
        read_lines(folder, 6 + table.num_rows - 4)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=20)
        assert process.returncode == 0
        assert f"{table.num_rows} of {table.num_rows} answered" in said
    truth = read_truth(folder / "answers.jsonl", output)
    assert len(truth.right) == table.num_rows - 1
    assert truth.right.sum() == table.num_rows - 3


def test_one_label_can_be_selected_and_its_name_is_escaped(
    browser: Browser, output: TaggedOutput, tmp_path: Path
) -> None:
    folder = tmp_path / "sample"
    write_sample(output, draw_sample(output, 10), folder, 0)
    table, _ = read_sample(folder)
    last = "<b>bold</b> & 'quoted'"
    rows = [row for row, label in enumerate(table["label"].to_pylist()) if label == last]
    with review(folder) as (url, _):
        browser.open(url)
        shown(browser)
        Select(browser.find("#labels")).select_by_index(3)
        browser.wait("document.getElementById('image').getAttribute('src') === arguments[0]", f"/api/image/{rows[0]}")
        assert browser.find("#label").text == last
        assert browser.find_all("#label b") == []
        press(browser, "u")
        assert read_lines(folder, 1)[0]["label"] == last
        assert browser.find("#count").text == f"1 of {len(rows)}"


def test_review_on_a_phone(browser: Browser, output: TaggedOutput, tmp_path: Path) -> None:
    folder = tmp_path / "sample"
    write_sample(output, draw_sample(output, 5), folder, 0)
    with review(folder) as (url, _):
        browser.open(url, *PHONE)
        shown(browser)
        assert browser.run("document.documentElement.scrollWidth") <= PHONE[0]
        for name in ("right", "wrong", "unsure"):
            box = browser.run(f"document.getElementById('{name}').getBoundingClientRect().toJSON()")
            assert box["height"] >= 44
            assert box["bottom"] <= PHONE[1]
        browser.find("#right").click()
        browser.wait("document.getElementById('image').getAttribute('src') === '/api/image/1'")
        shown(browser)
        for kind, x in (("pointerdown", 250), ("pointerup", 100)):
            event = f"new PointerEvent('{kind}', {{clientX: {x}, bubbles: true}})"
            browser.run(f"document.getElementById('stage').dispatchEvent({event})")
        assert [line["answer"] for line in read_lines(folder, 2)] == ["right", "wrong"]


def test_requests_from_other_origins_and_bad_answers_are_refused(output: TaggedOutput, tmp_path: Path) -> None:
    folder = tmp_path / "sample"
    write_sample(output, draw_sample(output, 5), folder, 0)
    with review(folder) as (url, _), httpx2.Client(base_url=url) as client:
        answer = {"row": 0, "answer": "right"}
        assert client.get("/", headers={"host": "evil.test"}).status_code == 400
        assert client.post("/api/answer", json=answer, headers={"origin": "https://evil.test"}).status_code == 403
        assert (
            client.post("/api/answer", content=json.dumps(answer), headers={"content-type": "text/plain"}).status_code
            == 422
        )
        assert client.post("/api/answer", json={"row": 10**6, "answer": "right"}).status_code == 404
        assert client.post("/api/answer", json={"row": 0, "answer": "yes"}).status_code == 422
        assert client.get("/api/image/-1").status_code == 404
        assert (folder / "answers.jsonl").read_text() == ""
        assert client.post("/api/answer", json=answer, headers={"origin": url}).status_code == 200
        assert "default-src 'none'" in client.get("/").headers["content-security-policy"]


def test_an_answers_file_of_another_sample_is_refused(output: TaggedOutput, tmp_path: Path) -> None:
    folder = tmp_path / "sample"
    write_sample(output, draw_sample(output, 5), folder, 0)
    write_tasks(read_questions(folder), output.labels, folder)
    for content, message in (
        ("none\n", "line 1 is not an answer"),
        ('{"id": "x", "label": "y", "answer": "right"}\n', "an image that is not in this sample"),
    ):
        (folder / "answers.jsonl").write_text(content)
        command = [sys.executable, "-m", "sightline", "review", str(folder), "--port", "0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert message in " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thousand")
    output = make(folder / "made", 1000)
    return write_report(output, compute_statistics(output), folder / "report.html")[0]


def test_the_report_by_keyboard(browser: Browser, thousand: Path) -> None:
    browser.open(thousand.as_uri())
    keys = ActionChains(browser.driver)
    keys.send_keys("j", "j", "k", "j").perform()
    assert browser.run("document.activeElement.id") == "label-2"
    browser.wait("Math.abs(document.activeElement.getBoundingClientRect().top) < 60")
    ActionChains(browser.driver).send_keys("/").perform()
    assert browser.run("document.activeElement.id") == "search"
    ActionChains(browser.driver).send_keys("LABEL 99").perform()
    names = browser.run("[...document.querySelectorAll('#index tbody tr:not([hidden]) a')].map(a => a.textContent)")
    assert sorted(names) == sorted(name for name in [f"label {n}" for n in range(999)] if "label 99" in name)
    ActionChains(browser.driver).send_keys("zzz").perform()
    assert browser.find("#nothing").is_displayed()
    ActionChains(browser.driver).send_keys(Keys.ESCAPE).perform()
    assert not browser.find("#nothing").is_displayed()
    Select(browser.find("#sort")).select_by_visible_text("name")
    assert browser.run("document.querySelector('#index tbody a').textContent") == "<b>bold</b> & 'quoted'"
    # Open a label on another page by its link.
    browser.find("#search").send_keys("bold", Keys.ENTER)
    browser.wait("document.readyState === 'complete' && location.hash.startsWith('#label-')")
    heading = "document.querySelector(location.hash + ' h3').textContent"
    assert browser.run(heading) == "<b>bold</b> & 'quoted'"
    assert browser.complaints() == []
    assert [one for one in browser.requests() if not one.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_on_a_phone(browser: Browser, thousand: Path, scheme: str) -> None:
    browser.open(thousand.as_uri(), *PHONE, prefers_color_scheme=scheme)
    assert browser.run("document.documentElement.scrollWidth") <= PHONE[0]
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 384) == (scheme == "dark")
    browser.wait("document.querySelector('#label-1 img').complete")


def test_a_report_of_a_thousand_labels_loads_and_filters_quickly(browser: Browser, thousand: Path) -> None:
    browser.open(thousand.as_uri())
    painted = browser.wait("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
    loaded = browser.run("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    typing = browser.run(
        "(() => { const box = document.getElementById('search'), before = performance.now(); box.value = 'label 5';"
        " box.dispatchEvent(new Event('input')); document.body.offsetHeight; return performance.now() - before; })()"
    )
    # Measured on an idle machine: 0.3 s, 0.4 s and 10 ms. The bounds are wide, so that a busy machine passes.
    assert painted < 5000
    assert loaded < 8000
    assert typing < 1000
