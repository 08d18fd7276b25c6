"""The review page in a real Chromium: one question at a time, by keyboard, on a phone, with a second tab."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from curation.quality.truth import read_truth
from curation.tagged_output import open_output
from tests.browser.reviews import PHONE, answer_elsewhere, current, press, read_lines, review, send, stop_polling
from tests.support.chromium import Browser
from tests.support.outputs import draw_picture, make_output
from tests.support.samples import make_sample, write_sample_files

pytestmark = pytest.mark.browser


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sample of two labels with six questions each."""
    write_sample_files(tmp_path / "sample", make_sample(["cat"] * 6 + ["dog"] * 6), draw_picture)
    return tmp_path / "sample"


def test_answers_by_keyboard_survive_a_kill_of_the_server(browser: Browser, tmp_path: Path) -> None:
    make_output(tmp_path / "made", 3)
    folder = tmp_path / "sample"
    command = [sys.executable, "-m", "sightline", "sample", str(tmp_path / "made"), str(folder), "--per-label", "4"]
    subprocess.run(command, check=True, capture_output=True)
    with review(folder) as (url, process):
        browser.open(url)
        assert [press(browser, key) for key in (Keys.ARROW_RIGHT, "w", Keys.ARROW_DOWN, "R")] == [0, 1, 2, 3]
        assert current(browser) == 4
        press(browser, Keys.BACKSPACE)
        assert current(browser) == 3
        press(browser, Keys.ARROW_LEFT)
        lines = read_lines(folder, 6)
        assert [line["answer"] for line in lines] == ["right", "wrong", "unsure", "right", "taken back", "wrong"]
        assert len({line["id"] for line in lines[3:]}) == 1
        count = browser.find("#count").text
        assert count.startswith("4 of ")
        questions = int(count.removeprefix("4 of "))
        assert [one for one in browser.requests() if not one.startswith((url, "data:"))] == []
        process.kill()
        process.wait()
        # The page keeps running without its server. It reports an answer that it could not save, and asks again.
        send(browser, "r")
        browser.wait("!document.getElementById('trouble').hidden")
        browser.wait("document.getElementById('trouble').textContent.startsWith('Not saved')")
        assert browser.find("#count").text == count
    with (folder / "answers.jsonl").open("a") as file:
        file.write('{"id": "half a li')  # what a process killed in the middle of a write leaves
    with review(folder) as (url, process):
        browser.open(url)
        assert current(browser) == 4
        for _ in range(questions - 4):
            press(browser, "r")
        assert "All questions are answered" in browser.find("#done-title").text
        assert browser.find("#next").text.startswith("sightline calibrate ")
        read_lines(folder, 6 + questions - 4)
        assert browser.complaints() == []
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=20)
        assert process.returncode == 0
        assert f"{questions} of {questions} answered" in said
    truth = read_truth(folder / "answers.jsonl", open_output(str(tmp_path / "made")))
    assert (len(truth.right), truth.right.sum()) == (questions - 1, questions - 3)


def test_a_page_goes_on_with_a_server_that_was_started_again(browser: Browser, folder: Path) -> None:
    with review(folder) as (url, process):
        browser.open(url)
        press(browser, "r")
        read_lines(folder, 1)
        process.kill()
        process.wait()
    with review(folder, "--port", url.rpartition(":")[2]):
        press(browser, "w")
        assert [line["answer"] for line in read_lines(folder, 2)] == ["right", "wrong"]
        assert not browser.find("#trouble").is_displayed()


def test_one_label_can_be_selected_and_its_name_is_escaped(browser: Browser, tmp_path: Path) -> None:
    last = "<b>bold</b> & 'quoted'"
    write_sample_files(tmp_path, make_sample(["a", last, "a", last]), draw_picture)
    with review(tmp_path) as (url, _):
        browser.open(url)
        current(browser)
        Select(browser.find("#labels")).select_by_index(2)
        assert current(browser, 1) == 1
        assert browser.find("#label").text == last
        assert browser.find_all("#label b") == []
        press(browser, "u")
        assert read_lines(tmp_path, 1)[0]["label"] == last
        assert browser.find("#count").text == "1 of 2"


def test_review_on_a_phone(browser: Browser, folder: Path) -> None:
    with review(folder) as (url, _):
        browser.open(url, *PHONE)
        current(browser)
        assert browser.run("document.documentElement.scrollWidth") <= PHONE[0]
        for name in ("right", "wrong", "unsure"):
            box = browser.run(f"document.getElementById('{name}').getBoundingClientRect().toJSON()")
            assert box["height"] >= 44
            assert box["bottom"] <= PHONE[1]
        browser.find("#right").click()
        assert current(browser, 1) == 1
        for kind, x in (("pointerdown", 250), ("pointerup", 100)):
            event = f"new PointerEvent('{kind}', {{clientX: {x}, bubbles: true}})"
            browser.run(f"document.getElementById('stage').dispatchEvent({event})")
        assert [line["answer"] for line in read_lines(folder, 2)] == ["right", "wrong"]


def test_long_names_fit_a_phone(browser: Browser, tmp_path: Path) -> None:
    sample = make_sample(["a label that is a sentence, " * 4 + "x" * 60] * 2)
    sample = sample.set_column(1, "key", [[f"{'folder/' * 60}{row}.jpg" for row in range(2)]])
    write_sample_files(tmp_path, sample, draw_picture)
    with review(tmp_path, "--name", "a" * 64) as (url, _):
        for view in ("one", "grid"):
            browser.open("about:blank")
            browser.open(f"{url}/#{view}", *PHONE)
            browser.wait("document.querySelector('main section:not([hidden]) img.shown')")
            assert browser.run("document.documentElement.scrollWidth") == PHONE[0]
            assert browser.run("document.documentElement.scrollHeight") == PHONE[1]


def test_an_answer_of_another_tab_is_not_replaced_but_shown(browser: Browser, folder: Path) -> None:
    with review(folder) as (url, _):
        browser.open(url)
        current(browser)
        stop_polling(browser)
        answer_elsewhere(url, 0, "right")
        press(browser, "w")
        browser.wait("!document.getElementById('notice').hidden")
        assert "0.jpg is “right”" in browser.find("#notice").text
        assert [line["answer"] for line in read_lines(folder, 1)] == ["right"]
        assert browser.find("#count").text == "1 of 12"
        # The undo of what was refused would take back the other tab's answer.
        assert not browser.find("#one .undo").is_enabled()
        press(browser, "w")
        press(browser, Keys.BACKSPACE)
        assert current(browser) == 1
        lines = read_lines(folder, 3)
        assert [(line["key"], line["answer"]) for line in lines] == [
            ("0.jpg", "right"),
            ("1.jpg", "wrong"),
            ("1.jpg", "taken back"),
        ]


def test_progress_of_another_tab_is_seen_without_a_reload(browser: Browser, folder: Path) -> None:
    with review(folder) as (url, _):
        browser.open(url)
        current(browser)
        answer_elsewhere(url, 5, "right")
        browser.wait("document.getElementById('count').textContent === '1 of 12'")
        assert current(browser) == 0  # the question on the screen stays
        answer_elsewhere(url, 0, "right")
        assert current(browser, 1) == 1
        assert browser.complaints() == []


def test_a_page_of_another_review_at_the_same_address_saves_nothing(
    browser: Browser, folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    write_sample_files(other, make_sample(["bird"] * 3), draw_picture)
    with review(folder) as (url, process):
        browser.open(url)
        current(browser)
        process.kill()
        process.wait()
    with review(other, "--port", url.rpartition(":")[2]):
        send(browser, "r")
        browser.wait("document.getElementById('trouble').textContent.includes('another review')")
        assert (other / "answers.jsonl").read_text() == ""


def test_undo_survives_a_reload(browser: Browser, folder: Path) -> None:
    with review(folder) as (url, _):
        browser.open(url)
        press(browser, "r")
        press(browser, "w")
        read_lines(folder, 2)
        browser.driver.refresh()
        assert current(browser) == 2
        press(browser, "z")
        assert current(browser) == 1
        assert read_lines(folder, 3)[2]["answer"] == "taken back"


def test_keys_work_on_a_cyrillic_keyboard_and_do_nothing_in_a_menu(browser: Browser, folder: Path) -> None:
    with review(folder) as (url, _):
        browser.open(url)
        current(browser)
        browser.find("#labels").send_keys("r")  # the menu's own search by letters
        event = "new KeyboardEvent('keydown', {key: 'ц', code: 'KeyW', bubbles: true})"
        browser.run(f"document.body.dispatchEvent({event})")
        assert current(browser, 1) == 1
        assert [line["answer"] for line in read_lines(folder, 1)] == ["wrong"]


def test_a_picture_that_nobody_has_seen_gets_no_answer(browser: Browser, tmp_path: Path) -> None:
    def draw(row: int) -> bytes:
        return b"not a picture" if row == 1 else draw_picture(row)

    write_sample_files(tmp_path, make_sample(["cat"] * 5), draw)
    with review(tmp_path) as (url, _):
        browser.open(url)
        current(browser)
        send(browser, "r")
        browser.wait("!document.getElementById('broken').hidden")
        for key in ("r", "w", "u"):
            send(browser, key)
        assert current(browser, 2) == 2
        assert [line["answer"] for line in read_lines(tmp_path, 2)] == ["right", "unsure"]
        # Pictures that take long: only the answer about the one on the screen counts.
        browser.run("void (HTMLImageElement.prototype.decode = () => new Promise(() => {}))")
        for key in ("r", "r", "r"):
            send(browser, key)
        browser.wait("document.getElementById('status').textContent.includes('not shown yet')")
        assert browser.find("#count").text == "3 of 5"
        assert len(read_lines(tmp_path, 3)) == 3


def test_scores_are_hidden_until_the_answer_unless_they_are_wanted(browser: Browser, folder: Path) -> None:
    with review(folder) as (url, _):
        browser.open(url)
        current(browser)
        assert browser.find("#score").text == ""
        press(browser, "r")
        press(browser, "w")
        browser.find("#view-list").click()
        assert "score 0.500" in browser.find("#answered .tile").text
        browser.find("#view-one").click()
        browser.find("#scores").click()
        assert browser.find("#score").text == "score 0.500"
        browser.driver.refresh()
        current(browser)
        assert browser.find("#score").text == "score 0.500"
        browser.find("#scores").click()
        browser.driver.refresh()
        current(browser)
        assert browser.find("#score").text == ""


def test_a_larger_picture_is_shown_when_the_original_is_there(browser: Browser, tmp_path: Path) -> None:
    original = tmp_path / "original.png"
    Image.new("RGB", (2000, 1000), "red").save(original)
    digest = hashlib.sha256(original.read_bytes()).hexdigest()
    sources = [(str(original), digest), (str(tmp_path / "gone.png"), digest[::-1])]
    folder = tmp_path / "sample"
    write_sample_files(folder, make_sample(["cat", "cat"], sources=sources), draw_picture)
    with review(folder) as (url, _):
        browser.open(url)
        current(browser)
        browser.wait("document.getElementById('image').naturalWidth === 1280")
        send(browser, "e")
        browser.wait("document.getElementById('zoom-note').textContent === 'original, 1280 × 640'")
        send(browser, "r")  # an answer closes the overlay
        assert current(browser, 1) == 1
        assert not browser.find("#zoom").is_displayed()
        width = browser.run("document.getElementById('image').naturalWidth")
        box = browser.run("document.getElementById('image').getBoundingClientRect().toJSON()")
        assert box["width"] == pytest.approx(3 * width, abs=1)  # a thumbnail is not stretched over the window
        browser.find("#stage").click()
        browser.wait("document.getElementById('zoom-note').textContent.includes('is not there')")
        send(browser, Keys.ESCAPE)
        assert not browser.find("#zoom").is_displayed()
        assert len(read_lines(folder, 1)) == 1


def test_answers_can_be_found_and_changed(browser: Browser, folder: Path) -> None:
    with review(folder) as (url, _):
        browser.open(url)
        for key in ("r", "u", "w", "u"):
            press(browser, key)
        send(browser, "a")
        browser.wait("document.querySelectorAll('#answered .tile').length === 4")
        Select(browser.find("#filter")).select_by_value("unsure")
        browser.wait("document.querySelectorAll('#answered .tile').length === 2")
        browser.find("#answered [data-row='3'] button").click()
        assert current(browser, 3) == 3
        assert browser.find("#unsure").get_attribute("aria-pressed") == "true"
        send(browser, "r")
        browser.wait("document.querySelectorAll('#answered .tile').length === 1")
        lines = read_lines(folder, 5)
        assert (lines[4]["key"], lines[4]["answer"]) == ("3.jpg", "right")
        # Questions are asked in the sample's order only, so that answers stay a random sample.
        Select(browser.find("#filter")).select_by_value("open")
        browser.wait("document.querySelectorAll('#answered .tile').length === 8")
        assert browser.find_all("#answered button:enabled") == []
        send(browser, Keys.TAB, "z")
        assert current(browser, 3) == 3
        assert browser.find("#unsure").get_attribute("aria-pressed") == "true"
        assert read_lines(folder, 6)[5]["answer"] == "unsure"


def test_disagreements_are_settled(browser: Browser, folder: Path) -> None:
    def write(name: str, *answers: str) -> None:
        rows = [
            {"id": f"000000-000000/{row}", "label": "cat", "sample": "s1", "answer": answer}
            for row, answer in enumerate(answers)
        ]
        (folder / f"answers-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("anna", "right", "right", "wrong", "right")
    write("ben", "right", "wrong", "wrong", "unsure")
    with review(folder, "--settle") as (url, process):
        browser.open(url)
        assert current(browser) == 1
        assert browser.find("#said").text == "anna: right, ben: wrong"
        assert not browser.find("#view-grid").is_displayed()
        send(browser, "g")  # each disagreement is looked at by itself
        assert browser.find("#one").is_displayed()
        send(browser, "w")
        browser.wait("!document.getElementById('agreement').hidden")
        assert "anna and ben: 2 of 3 answers are equal" in browser.find("#agreement").text
        assert [line["answer"] for line in read_lines(folder, 1, "answers-settled.jsonl")] == ["wrong"]
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=20)
        assert "1 of 1 answered" in said
        assert "disagreements: 1, settled: 1" in said


def test_all_controls_have_names(browser: Browser, folder: Path) -> None:
    with review(folder) as (url, _):
        for view in ("one", "grid", "list"):
            browser.open(f"{url}/#{view}")
            browser.wait(f"!document.getElementById('{view}').hidden")
            nodes: list[dict[str, Any]] = browser.command("Accessibility.getFullAXTree", {})["nodes"]
            controls = [
                node for node in nodes if node.get("role", {}).get("value") in ("button", "combobox", "checkbox")
            ]
            assert len(controls) > 5
            assert [node for node in controls if not node["name"]["value"]] == []


def test_requests_from_other_origins_are_refused(folder: Path) -> None:
    with review(folder) as (url, _), httpx2.Client(base_url=url) as client:
        page = client.get("/api/sample").json()
        body = {"review": page["review"], "since": 0, "answers": [{"row": 0, "answer": "right", "version": 0}]}
        assert client.post("/api/answers", json=body, headers={"origin": "https://evil.test"}).status_code == 403
        text = {"content-type": "text/plain"}
        assert client.post("/api/answers", content=json.dumps(body), headers=text).status_code == 422
        assert client.post("/api/answers", json=body, headers={"origin": url}).status_code == 200
