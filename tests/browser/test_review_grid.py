"""The grid of the review page in a real Chromium: thirty questions at once, saved and undone together."""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from tests.browser.reviews import PHONE, answer_elsewhere, current, read_lines, review, send, stop_polling
from tests.support.chromium import Browser
from tests.support.outputs import draw_picture
from tests.support.samples import make_sample, write_sample_files

pytestmark = pytest.mark.browser
ROWS = "[...document.querySelectorAll('#tiles .tile')].map(tile => Number(tile.dataset.row))"
MARKS = (
    "Object.fromEntries([...document.querySelectorAll('#tiles .tile')]"
    ".filter(tile => tile.dataset.mark !== 'right').map(tile => [tile.dataset.row, tile.dataset.mark]))"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sample of a label with 35 questions and one with four."""
    write_sample_files(tmp_path / "sample", make_sample(["cat"] * 35 + ["dog"] * 4), draw_picture)
    return tmp_path / "sample"


def open_grid(browser: Browser, url: str, *size: int) -> None:
    browser.open("about:blank")
    browser.open(f"{url}/#grid", *size)
    wait_for_grid(browser, 0, 30)


def wait_for_grid(browser: Browser, first: int, count: int) -> None:
    """Wait until a grid of `count` rows from `first` on is there, can be saved, and has the focus."""
    browser.wait(f"String({ROWS}) === '{','.join(map(str, range(first, first + count)))}'")
    browser.wait("!document.getElementById('save').disabled")


def save(browser: Browser) -> None:
    """Scroll to the last picture, and save the grid."""
    browser.run("document.querySelector('#tiles .tile:last-child').scrollIntoView()")
    send(browser, Keys.ENTER)


def click(browser: Browser, *rows: int) -> None:
    for row in rows:
        browser.find(f"#tiles [data-row='{row}'] .picture").click()


def test_a_grid_by_keyboard_is_saved_at_once_and_undone_at_once(browser: Browser, folder: Path) -> None:
    with review(folder) as (url, _):
        open_grid(browser, url)
        assert browser.find("#save").text.startswith("Save: 30 right")
        columns = browser.run("getComputedStyle(document.getElementById('tiles')).gridTemplateColumns").count(" ") + 1
        send(browser, Keys.ARROW_RIGHT, Keys.SPACE, Keys.ARROW_DOWN, "u", Keys.ARROW_LEFT, Keys.SPACE, Keys.SPACE)
        marks = {"1": "wrong", str(columns + 1): "unsure", str(columns): "unsure"}
        assert browser.run(MARKS) == marks
        save(browser)
        wait_for_grid(browser, 30, 5)  # of the next label is nothing in the grid
        lines = read_lines(folder, 30)
        assert [line["key"] for line in lines] == [f"{row}.jpg" for row in range(30)]  # the sample's order
        said = {str(row): line["answer"] for row, line in enumerate(lines) if line["answer"] != "right"}
        assert said == marks
        assert len({line["at"] for line in lines}) == 1  # one request
        send(browser, Keys.BACKSPACE)
        wait_for_grid(browser, 0, 30)
        assert [line["answer"] for line in read_lines(folder, 60)[30:]] == ["taken back"] * 30
        assert browser.run(MARKS) == marks  # they need not be found again
        click(browser, 1, 1)
        save(browser)
        wait_for_grid(browser, 30, 5)
        assert read_lines(folder, 90)[61]["answer"] == "right"
        save(browser)
        wait_for_grid(browser, 35, 4)
        assert browser.find("#grid-label").text == "dog"
        save(browser)
        browser.wait("!document.getElementById('done').hidden")
        assert browser.complaints() == []


def test_a_grid_is_not_saved_before_its_last_picture_was_on_the_screen(browser: Browser, folder: Path) -> None:
    with review(folder) as (url, _):
        open_grid(browser, url, 1200, 700)
        seen = (
            "(() => { const box = document.getElementById('tiles').getBoundingClientRect();"
            " return [...document.querySelectorAll('#tiles .tile')].filter(tile => {"
            " const one = tile.getBoundingClientRect(); return one.top >= box.top && one.bottom <= box.bottom + 1; })"
            ".map(tile => Number(tile.dataset.row)); })()"
        )
        shown = set(browser.run(seen))
        assert 0 in shown
        assert 29 not in shown
        for _ in range(5):
            if 29 in shown:
                break
            before = max(shown)
            send(browser, Keys.ENTER, Keys.ENTER)  # the second one comes before anybody has looked
            assert "more images below" in browser.find("#below").text
            assert "more images below" in browser.run("document.getElementById('status').textContent")
            shown |= set(browser.run(seen))
            assert max(shown) > before
            assert int(browser.run("document.activeElement.closest('.tile').dataset.row")) == before + 1
            assert (folder / "answers.jsonl").read_text() == ""
            wait_for_grid(browser, 0, 30)
        assert shown == set(range(30))
        browser.run("document.getElementById('tiles').scrollTop = 0")  # what was seen stays seen
        browser.wait("document.getElementById('tiles').scrollTop === 0")
        send(browser, Keys.ENTER)
        wait_for_grid(browser, 30, 5)
        assert len(read_lines(folder, 30)) == 30
        assert browser.find("#below").text == ""
        send(browser, Keys.BACKSPACE)
        wait_for_grid(browser, 0, 30)
        assert 0 in browser.run(seen)  # a grid begins at its first picture


def test_scores_are_in_the_grid_only_if_they_are_wanted(browser: Browser, folder: Path) -> None:
    with review(folder) as (url, _):
        open_grid(browser, url)
        assert browser.find("#tiles .tile").text == "0.jpg"
        browser.find("#scores").click()
        assert browser.find("#tiles .tile").text == "score 0.500, 0.jpg"
        browser.find("#scores").click()
        assert browser.find("#tiles .tile").text == "0.jpg"


def test_enter_pressed_twice_saves_one_grid(browser: Browser, folder: Path) -> None:
    with review(folder) as (url, _):
        open_grid(browser, url)
        browser.run("document.querySelector('#tiles .tile:last-child').scrollIntoView()")
        event = "new KeyboardEvent('keydown', {key: 'Enter', bubbles: true})"
        browser.run(f"void [1, 2, 3].forEach(() => document.body.dispatchEvent({event}))")
        wait_for_grid(browser, 30, 5)
        assert len(read_lines(folder, 30)) == 30
        assert browser.find("#count").text == "30 of 39"


def test_marks_stay_when_the_view_is_left(browser: Browser, folder: Path) -> None:
    with review(folder) as (url, _):
        open_grid(browser, url)
        click(browser, 3, 7, 7)
        send(browser, "o")
        current(browser)
        send(browser, "w")  # the first question, answered alone
        assert current(browser, 1) == 1
        send(browser, "g")
        wait_for_grid(browser, 1, 30)
        assert browser.run(MARKS) == {"3": "wrong", "7": "unsure"}


def test_answers_of_another_tab_are_kept_and_the_others_saved(browser: Browser, folder: Path) -> None:
    with review(folder) as (url, _):
        open_grid(browser, url)
        stop_polling(browser)
        click(browser, 4, 5)
        answer_elsewhere(url, 4, "right")  # this page has it marked as wrong
        answer_elsewhere(url, 5, "wrong")  # the same as here
        save(browser)
        wait_for_grid(browser, 30, 5)
        assert "4.jpg is “right”. Your answer was not saved" in browser.find("#notice").text
        lines = read_lines(folder, 30)
        assert {line["key"]: line["answer"] for line in lines} == {
            f"{row}.jpg": "wrong" if row == 5 else "right" for row in range(30)
        }
        assert len(lines) == 30
        send(browser, Keys.BACKSPACE)
        browser.wait("document.getElementById('count').textContent === '1 of 39'")
        taken = {line["key"] for line in read_lines(folder, 59)[30:]}
        assert "4.jpg" not in taken  # undo takes back what this page has saved


def test_answers_of_another_tab_are_seen_in_the_grid(browser: Browser, folder: Path) -> None:
    with review(folder) as (url, _):
        open_grid(browser, url)
        click(browser, 2)
        answer_elsewhere(url, 2, "right")
        browser.wait(f"{MARKS}['2'] === 'other'")
        click(browser, 2)  # does nothing: an answer is changed under Answers
        assert browser.run(MARKS) == {"2": "other"}
        assert browser.find("#save").text.startswith("Save: 29 right")


def test_marks_stay_when_the_grid_cannot_be_saved(browser: Browser, folder: Path) -> None:
    with review(folder) as (url, process):
        open_grid(browser, url)
        click(browser, 2, 9)
        process.kill()
        process.wait()
        save(browser)
        browser.wait("document.getElementById('trouble').textContent.startsWith('Not saved')")
        assert browser.run(MARKS) == {"2": "wrong", "9": "wrong"}
        assert browser.find("#count").text == "0 of 39"
    with review(folder, "--port", url.rpartition(":")[2]):
        save(browser)
        wait_for_grid(browser, 30, 5)
        assert [row for row, line in enumerate(read_lines(folder, 30)) if line["answer"] == "wrong"] == [2, 9]


def test_keys_in_the_enlarged_picture_are_about_that_picture(browser: Browser, folder: Path) -> None:
    with review(folder) as (url, _):
        open_grid(browser, url)
        browser.find("#tiles [data-row='3'] .magnify").click()
        browser.wait("document.getElementById('zoom').open")
        send(browser, Keys.ARROW_RIGHT, "w")
        assert browser.find("#zoom-key").text == "4.jpg"
        assert browser.find("#zoom-mark").text == "wrong"
        send(browser, Keys.SPACE, Keys.SPACE, Keys.SPACE)
        assert browser.find("#zoom-mark").text == "wrong"  # after unsure and right: the space bar closes nothing
        send(browser, Keys.ENTER)  # closes, and saves nothing
        assert not browser.find("#zoom").is_displayed()
        assert browser.run(MARKS) == {"4": "wrong"}
        assert browser.run("document.activeElement.closest('.tile').dataset.row") == "4"
        assert (folder / "answers.jsonl").read_text() == ""


def test_a_broken_picture_is_unsure(browser: Browser, tmp_path: Path) -> None:
    write_sample_files(tmp_path, make_sample(["cat"] * 4), lambda row: b"no" if row == 2 else draw_picture(row))
    with review(tmp_path) as (url, _):
        browser.open(f"{url}/#grid")
        wait_for_grid(browser, 0, 4)
        click(browser, 2)
        save(browser)
        assert [line["answer"] for line in read_lines(tmp_path, 4)] == ["right", "right", "unsure", "right"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_grid_on_a_phone(browser: Browser, folder: Path, scheme: str) -> None:
    with review(folder) as (url, _):
        browser.open("about:blank")
        browser.open(f"{url}/#grid", *PHONE, prefers_color_scheme=scheme)
        wait_for_grid(browser, 0, 30)
        assert browser.run("document.documentElement.scrollWidth") <= PHONE[0]
        assert browser.run("document.documentElement.scrollHeight") <= PHONE[1]  # the page scrolls under its header
        paper = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper[4:-1].split(","))) < 384) == (scheme == "dark")
        for selector in (".picture", ".magnify"):
            box = browser.run(f"document.querySelector('#tiles {selector}').getBoundingClientRect().toJSON()")
            assert min(box["width"], box["height"]) >= 44
        # Not by a click of chromedriver, which resizes the imitated phone for it, so that the page scrolls away.
        browser.run("document.querySelector(\"#tiles [data-row='29'] .picture\").click()")
        # The button comes after the last picture, so that the pictures are seen before it.
        last, button = (
            browser.run(f'document.querySelector("{selector}").getBoundingClientRect().toJSON()')
            for selector in ("#tiles [data-row='29']", "#save")
        )
        assert button["top"] >= last["bottom"]
        browser.run("document.getElementById('save').scrollIntoView()")
        browser.run("document.getElementById('save').click()")
        assert read_lines(folder, 30)[29]["answer"] == "wrong"
