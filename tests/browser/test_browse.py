"""The page of `sightline browse` in a real Chromium: search, filters, a grid of any size, and a selection."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from benchmarks.outputs import SyntheticOutput, write_output
from curation.quality.truth_files import read_truth_file
from curation.search.query import Query
from curation.search.search import search_output
from curation.tagged_output import open_output
from siglip.labels import LabelSet
from siglip.scoring import Scale
from tests.support.browse_page import COUNT, POSITIONS, SHOWN, browse, search, send, show
from tests.support.chromium import Browser
from tests.support.growing_output import GrowingOutput
from tests.support.outputs import draw_picture
from tests.support.samples import make_sample, write_sample_files
from tests.support.vectors import draw_vectors

pytestmark = pytest.mark.browser
PHONE = (390, 844)
NAMES = ["cat", "dog", "bird", "<b>tree</b> & 'c'"]
WIDTH, SHARD = 16, 400
TEXTS = draw_vectors(len(NAMES), WIDTH, 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of 800 images with labels that can be searched for without a model."""
    root = tmp_path_factory.mktemp("browse") / "holiday"
    labels = LabelSet.model_validate({"names": NAMES, "threshold": 0.2, "top_k": 2})
    write_output(
        str(root),
        SyntheticOutput(
            labels, TEXTS, 2, lambda shard: draw_vectors(SHARD, WIDTH, 10 + shard), scale=Scale(20, -8),
            thumbnail=draw_picture, reject=lambda shard: ["truncated", "too_many_pixels"][: shard + 1],
        ),
    )  # fmt: skip
    return root


PRETENDS_TO_RUN = """(() => {
    const { fetch } = window;
    window.fetch = async (path, options) => {
        const response = await fetch(path, options);
        const kept = path !== "api/export" || options.method === "DELETE" || window.cancelled;
        return kept ? response : new Response(JSON.stringify({ state: "running", rows: 5, lines: [] }));
    };
})()"""
"""Makes the page see an export that is under way until `window.cancelled` is set."""


def order(browser: Browser) -> list[str]:
    """The keys of the tiles on the screen, in their order."""
    script = (
        "[...document.querySelectorAll('.tile[data-position]')].sort((a, b) => a.dataset.index - b.dataset.index)"
        ".map(tile => tile.querySelector('.caption').lastChild.textContent)"
    )
    found: list[str] = browser.run(script)
    return found


def test_a_search_shows_what_the_command_finds_and_filters_combine(browser: Browser, root: Path) -> None:
    output = open_output(str(root))
    with browse(root) as url:
        show(browser, url)
        assert browser.run(COUNT).startswith("800 images")
        search(browser, "cat -dog")
        expected = search_output(output, Query(["cat"], ["dog"], top=800))
        assert browser.run(COUNT).startswith(f"{expected.table.num_rows} image")
        assert order(browser)[:20] == expected.table["key"].to_pylist()[:20]
        # The label's name is text, whatever is in it, and its filter narrows the result.
        search(browser, "cat -dog")
        [tree] = [one for one in browser.find_all("#labels button") if NAMES[3] in one.text]
        tree.click()
        both = search_output(output, Query(["cat"], ["dog"], labels=[NAMES[3]], top=800))
        browser.wait(f"{COUNT}.startsWith('{both.table.num_rows} image')")
        slider = browser.find("#labels input[type=range]")
        browser.run("(arguments[0].value = 0.6, arguments[0].dispatchEvent(new Event('input')))", slider)
        browser.wait("document.querySelector('#chips .chip')?.textContent.includes('≥ 0.6')")
        browser.wait(f"!{COUNT}.startsWith('{both.table.num_rows} image')")
        address = browser.run("location.href")
        shown = browser.run(SHOWN)
        show_again = browser.run("document.querySelectorAll('.tile').length")
        browser.open(address)  # the address has all of it
        browser.wait(f"document.querySelectorAll('.tile').length === {show_again}")
        browser.wait(f"JSON.stringify({SHOWN}) === '{json.dumps(shown, separators=(',', ':'))}'")
        browser.driver.back()
        assert browser.complaints() == []
        assert all(one.startswith(url.split("#")[0]) for one in browser.requests() if one.startswith("http"))


def test_a_search_that_finds_nothing_says_so_and_offers_the_nearest(browser: Browser, root: Path) -> None:
    with browse(root) as url:
        show(browser, url)
        browser.find("#where").send_keys("key = 'image 00000003'", Keys.ENTER)
        browser.wait(f"{COUNT}.startsWith('1 image ')")
        search(browser, NAMES[3])
        browser.wait(f"{COUNT}.startsWith('Nothing here is relevant')")
        browser.find("#note button").click()
        browser.wait(f"{COUNT}.startsWith('1 image ')")
        browser.find("#where").clear()
        browser.find("#where").send_keys("nothing > 3", Keys.ENTER)
        browser.wait("document.getElementById('note').textContent.includes('nothing')")


def test_neighbours_rejects_and_a_dropped_image(browser: Browser, root: Path) -> None:
    with browse(root) as url:
        show(browser, url)
        send(browser, Keys.ARROW_RIGHT, Keys.ENTER)
        browser.wait("document.getElementById('detail').open")
        assert browser.find("#detail-key").text == "image 00000001"
        assert {one.text for one in browser.find_all("#detail-scores .name")} == set(NAMES)
        send(browser, Keys.ARROW_RIGHT)
        browser.wait("document.getElementById('detail-key').textContent === 'image 00000002'")
        send(browser, "m")
        browser.wait(f"{COUNT}.startsWith('799 images')")
        expected = search_output(open_output(str(root)), Query(like=["image 00000002"], top=20))
        browser.wait("document.querySelectorAll('.tile[data-position]').length >= 20")
        assert order(browser)[:20] == expected.table["key"].to_pylist()
        [truncated] = [one for one in browser.find_all("#reasons button") if "truncated" in one.text]
        truncated.click()
        browser.wait("document.querySelectorAll('#rejects tbody tr').length === 2")
        assert "2 rejected" in browser.run(COUNT)
        browser.find("#chips .chip:last-child").click()
        browser.wait("document.getElementById('rejects').hidden")
        # The model is nowhere: a dropped image cannot be embedded, and the page says so.
        drop = (
            "(() => { const data = new DataTransfer(); data.items.add(new File(['x'], 'x.png', {type: 'image/png'}));"
            "document.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true})); })()"
        )
        browser.run(drop)
        browser.wait("document.getElementById('note').textContent.includes('--model')")


def test_a_selection_by_mouse_and_keys_becomes_a_list_answers_and_an_export(
    browser: Browser, root: Path, tmp_path: Path
) -> None:
    with browse(root) as url:
        show(browser, url)
        tiles = browser.find_all(".tile")
        tiles[2].find_element(By.CSS_SELECTOR, ".select").click()
        ActionChains(browser.driver).key_down(Keys.SHIFT).click(tiles[5]).key_up(Keys.SHIFT).perform()
        browser.wait("document.getElementById('selected').textContent === '4 selected'")
        send(browser, Keys.ARROW_RIGHT, Keys.SPACE)
        browser.wait("document.getElementById('selected').textContent === '5 selected'")
        ActionChains(browser.driver).key_down(Keys.SHIFT).send_keys(Keys.ARROW_RIGHT).key_up(Keys.SHIFT).perform()
        browser.wait("document.getElementById('selected').textContent === '6 selected'")
        selected = "[...document.querySelectorAll('.tile[aria-selected=true]')].map(tile => Number(tile.dataset.index))"
        assert sorted(browser.run(selected)) == [2, 3, 4, 5, 6, 7]
        browser.find("#answer").click()
        Select(browser.find("#answer-label")).select_by_visible_text(NAMES[3])
        browser.find("#answers-save").click()
        browser.wait("document.getElementById('answers-said').textContent.includes('6 answers')")
        truth = read_truth_file(root.parent / "browse-answers.jsonl")
        expected = open_output(str(root)).take(range(2, 8), ["id"])["id"].to_pylist()
        assert [(row.image, row.label, row.answer) for row in truth.rows] == [
            (one, NAMES[3], "right") for one in expected
        ]
        browser.find("#answers-undo").click()
        browser.wait("document.getElementById('answers-said').textContent.includes('taken back')")
        assert read_truth_file(root.parent / "browse-answers.jsonl").rows == []
        browser.find("#answers .close").click()
        browser.find("#export").click()
        Select(browser.find("#export-target")).select_by_visible_text("hf")
        browser.find("#export-to").send_keys(str(tmp_path / "out"), Keys.ENTER)
        browser.wait("document.getElementById('export-said').textContent.startsWith('6 images are in')")
        exported = [
            row["id"] for path in (tmp_path / "out").rglob("*.parquet") for row in pq.read_table(path).to_pylist()
        ]
        assert sorted(exported) == sorted(expected)
        assert not browser.find("#export-cancel").is_displayed()
        browser.run(PRETENDS_TO_RUN)
        browser.find("#exports .close").click()
        browser.find("#export").click()
        browser.wait("!document.getElementById('export-cancel').hidden")
        browser.find("#export-cancel").click()
        browser.run("window.cancelled = true")
        browser.wait("document.getElementById('export-cancel').hidden")
        browser.find("#exports .close").click()
        ActionChains(browser.driver).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).perform()
        browser.wait("document.getElementById('selected').textContent === '800 selected'")
        send(browser, Keys.ESCAPE)
        browser.wait("document.getElementById('selection').hidden")
        assert browser.complaints() == []


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of a million images, each of them a number of four bytes, with a picture that all of them share."""
    root = tmp_path_factory.mktemp("many") / "many"
    labels = LabelSet.model_validate({"names": ["cat", "dog"], "threshold": 0.5, "top_k": 1})
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 90, 40)).save(buffer, "JPEG")
    write_output(
        str(root),
        SyntheticOutput(
            labels, draw_vectors(2, 4, 1), 10, lambda shard: draw_vectors(100_000, 4, shard), scale=Scale(5, -2),
            thumbnail=lambda row: buffer.getvalue(), key="{:07d}".format,
        ),
    )  # fmt: skip
    return root


@pytest.mark.parametrize("size", [(1280, 860), PHONE])
def test_a_grid_of_a_million_images_reaches_each_of_them(browser: Browser, many: Path, size: tuple[int, int]) -> None:
    with browse(many) as url:
        show(browser, url, *size)
        browser.wait(f"{COUNT}.startsWith('1,000,000 images')")
        assert browser.run("document.getElementById('grid').scrollHeight") < 5_000_000  # browsers limit it
        browser.run("document.getElementById('grid').focus()")
        seen = f"Math.max(...{POSITIONS})"
        send(browser, Keys.END)
        browser.wait(f"{seen} === 999999")
        last = "document.querySelector('.tile[data-position=\"999999\"]').getBoundingClientRect().bottom"
        assert browser.run(last) <= browser.run("document.getElementById('grid').getBoundingClientRect().bottom") + 1
        send(browser, Keys.ARROW_LEFT, Keys.SPACE)
        browser.wait("document.querySelector('.tile[data-position=\"999998\"]').ariaSelected === 'true'")
        send(browser, Keys.HOME)
        browser.wait("!!document.querySelector('.tile[data-position=\"0\"] img.shown')")
        # A drag of the scroll bar goes to about that share, and small steps from there skip no row of tiles.
        browser.run("(document.getElementById('grid').scrollTop = document.getElementById('grid').scrollHeight / 2)")
        browser.wait(f"{seen} > 450000 && {seen} < 550000")
        time.sleep(0.4)  # the page brings the scroll bar to its place once nothing moves
        first = browser.run(seen)
        positions = set(browser.run(SHOWN))
        for _ in range(12):
            browser.run("document.getElementById('grid').scrollBy(0, 150)")
            browser.wait("![...document.querySelectorAll('.tile')].some(tile => !tile.dataset.position)")
            positions |= set(browser.run(SHOWN))
        assert browser.run(seen) > first
        assert sorted(positions) == list(range(min(positions), max(positions) + 1))


def test_what_later_runs_commit_appears_and_what_is_typed_meanwhile_stays(browser: Browser, tmp_path: Path) -> None:
    growing = GrowingOutput(tmp_path / "growing")
    growing.grow(1, 100)
    with browse(growing.root) as url:
        browser.open(url)
        browser.wait(f"{COUNT}.startsWith('100 images')")
        browser.find("#q").send_keys("a dog on a be")
        growing.grow(2, 100)
        browser.wait(f"{COUNT}.startsWith('300 images')")
        assert browser.run("document.getElementById('q').value") == "a dog on a be"
        assert browser.complaints() == []


def test_a_review_of_a_sample_is_a_part_of_the_page(browser: Browser, root: Path, tmp_path: Path) -> None:
    write_sample_files(tmp_path / "sample", make_sample(["cat"] * 3), draw_picture)
    with browse(root, "--sample", str(tmp_path / "sample"), "--name", "ann") as url:
        show(browser, url)
        browser.find("#review").click()
        browser.wait("document.querySelector('#one:not([hidden]) #image.shown')")
        send(browser, "r")
        lines = threading.Event()
        path = tmp_path / "sample" / "answers-ann.jsonl"
        for _ in range(100):
            if path.exists() and path.read_text().strip():
                break
            lines.wait(0.05)
        assert json.loads(path.read_text())["answer"] == "right"
        assert browser.complaints() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 860), PHONE])
def test_nothing_overflows_and_all_controls_can_be_reached(
    browser: Browser, root: Path, size: tuple[int, int], scheme: str, tmp_path: Path
) -> None:
    with browse(root, "--label", NAMES[3]) as url:
        show(browser, url, *size, prefers_color_scheme=scheme)
        assert browser.run("document.documentElement.scrollWidth") <= size[0]
        assert NAMES[3] in browser.find("#chips").text
        browser.find_all(".tile .select")[0].click()
        if size == PHONE:
            browser.find("#filters").click()
            assert browser.find("#where").is_displayed()
            browser.find("#close-filters").click()
        for one in browser.find_all("#selection button, #bar select, #bar input, #search input:not([hidden])"):
            box = one.rect
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= size[0]
        browser.screenshot(tmp_path / "page.png")
        with Image.open(tmp_path / "page.png") as picture:
            corner = np.asarray(picture.convert("L"))[5, 5]
        assert (corner < 128) == (scheme == "dark")
