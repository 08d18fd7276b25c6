"""The page of `sightline browse` when the command, the output or the address changes, and on a narrow screen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from benchmarks.outputs import SyntheticOutput, write_output
from siglip.labels import LabelSet
from siglip.scoring import Scale
from tests.support.browse_page import COUNT, browse, search, send, show
from tests.support.chromium import Browser
from tests.support.growing_output import GrowingOutput
from tests.support.outputs import draw_picture
from tests.support.vectors import draw_vectors

pytestmark = pytest.mark.browser
NAMES = ["cat", "dog", "a label whose name is much too long for the width of a phone, and has no end"]
WIDTH = 16
SELECTED = "document.getElementById('selected').textContent"
NOTE = "document.getElementById('note').textContent"
DETAIL = "document.getElementById('detail').open"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of 200 images with labels that can be searched for without a model."""
    root = tmp_path_factory.mktemp("browse") / "holiday"
    write(root, "image {:08d}")
    return root


def write(root: Path, key: str, shards: int = 2) -> None:
    labels = LabelSet.model_validate({"names": NAMES, "threshold": 0.2})
    made = SyntheticOutput(
        labels, draw_vectors(len(NAMES), WIDTH, 1), shards, lambda shard: draw_vectors(100, WIDTH, 10 + shard),
        scale=Scale(20, -8), thumbnail=draw_picture, key=key.format, reject=lambda shard: ["truncated"] * shard,
    )  # fmt: skip
    write_output(str(root), made)


def test_a_selection_is_not_taken_for_images_of_a_command_that_was_started_later(
    browser: Browser, root: Path, tmp_path: Path
) -> None:
    write(tmp_path / "other", "other {:08d}")
    with browse(root) as url:
        show(browser, url)
        send(browser, Keys.SPACE)
        browser.wait(f"{SELECTED} === '1 selected'")
    with browse(tmp_path / "other", "--port", str(urlsplit(url).port)):
        browser.wait(f"{NOTE}.includes('started again')")
        browser.run("(window.saved = null, URL.createObjectURL = (blob) => { window.saved = blob; return '#'; })")
        browser.run("document.getElementById('note').firstElementChild.textContent = ''")
        browser.find("#save-list").click()
        browser.wait(f"{NOTE}.includes('earlier run')")
        assert browser.run("window.saved") is None
        browser.find("#answer").click()
        browser.find("#answers-save").click()
        browser.wait("document.getElementById('answers-said').textContent.includes('earlier run')")
        assert not (tmp_path / "browse-answers.jsonl").exists()
        send(browser, Keys.ESCAPE)
        browser.find("#note button").click()  # load again
        browser.wait("document.querySelector('.tile .caption')?.textContent.startsWith('other')")


def test_another_output_in_the_same_place_is_loaded_again(browser: Browser, root: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(root, place)
    with browse(place) as url:
        show(browser, url)
        shutil.rmtree(place)
        write(place, "other {:08d}", 3)
        browser.wait(f"{NOTE}.includes('another output')")
        browser.find("#note button").click()
        browser.wait("document.querySelector('.tile .caption')?.textContent.startsWith('other')")


def test_a_selection_follows_rows_that_were_replaced(browser: Browser, tmp_path: Path) -> None:
    growing = GrowingOutput(tmp_path / "growing")
    growing.grow(2, 70, rejected={5, 6})
    with browse(growing.root) as url:
        browser.open(url)
        browser.wait(f"{COUNT}.startsWith('136 images')")
        send(browser, Keys.SPACE, Keys.ARROW_RIGHT, Keys.SPACE)
        browser.wait(f"{SELECTED} === '2 selected'")
        growing.retry()
        browser.wait(f"{COUNT}.startsWith('140 images')")
        browser.wait("document.querySelectorAll('.tile[aria-selected=true]').length === 2")
        ActionChains(browser.driver).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).perform()
        browser.wait(f"{SELECTED} === '140 selected'")


def test_an_address_that_was_changed_by_hand_opens_the_page(browser: Browser, root: Path) -> None:
    states: list[Any] = [
        {"labels": None}, {"labels": {}}, {"labels": [5, {"label": "cat", "min": None}]}, {"like": {}}, {"q": 5},
        {"order": "worst"}, {"cutoff": 1}, {"images": [{}]}, [], None, 3,
    ]  # fmt: skip
    with browse(root) as url:
        for state in states:
            browser.open("about:blank")
            show(browser, f"{url}#{quote(json.dumps(state))}")
            assert "image" in browser.run(COUNT)
            assert browser.run("document.getElementById('note').hidden"), state
            assert browser.complaints() == []


def test_back_shows_the_condition_and_the_text_of_then(browser: Browser, root: Path) -> None:
    with browse(root) as url:
        show(browser, url)
        search(browser, "cat")
        browser.find("#where").send_keys("key < 'image 00000003'", Keys.ENTER)
        browser.wait("document.querySelectorAll('.chip').length === 1")
        browser.driver.back()
        browser.wait("document.querySelectorAll('.chip').length === 0")
        browser.wait("document.getElementById('where').value === ''")
        assert browser.run("document.getElementById('q').value") == "cat"
        browser.driver.forward()
        browser.wait("document.getElementById('where').value.startsWith('key <')")


def test_keys_select_and_open_nothing_while_rejected_images_are_shown(browser: Browser, root: Path) -> None:
    with browse(root) as url:
        show(browser, url)
        browser.find("#reasons button").click()
        browser.wait("!document.getElementById('rejects').hidden")
        browser.run("document.activeElement.blur()")
        ActionChains(browser.driver).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).perform()
        send(browser, Keys.SPACE, Keys.ARROW_RIGHT, Keys.SPACE, Keys.ENTER, "m")
        browser.find("#chips .chip").click()
        browser.wait(f"{COUNT}.startsWith('200 images')")
        assert browser.run("document.getElementById('selection').hidden")
        assert not browser.run(DETAIL)


def test_a_result_that_is_no_longer_there_is_made_anew_and_the_selection_stays(browser: Browser, root: Path) -> None:
    with browse(root) as url:
        show(browser, url)
        send(browser, Keys.SPACE)
        browser.wait(f"{SELECTED} === '1 selected'")
        again = (
            "fetch('api/about').then((one) => one.json()).then(({run}) => fetch(`api/search/${run}`, {method: 'POST', "
            "headers: {'content-type': 'application/json'}, body: '{}'})).then((one) => one.status)"
        )
        assert [browser.run(again) for _ in range(9)] == [200] * 9  # as another tab asks for
        ActionChains(browser.driver).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).perform()
        browser.wait(f"{NOTE}.includes('no longer there')")
        browser.find("#note button").click()
        browser.wait("document.getElementById('note').hidden")
        assert browser.run(SELECTED) == "1 selected"
        browser.run("document.getElementById('grid').focus()")
        ActionChains(browser.driver).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).perform()
        browser.wait(f"{SELECTED} === '200 selected'")


def test_a_text_all_of_whose_images_are_unwanted_is_not_said_to_be_irrelevant(browser: Browser, root: Path) -> None:
    with browse(root) as url:
        show(browser, url)
        search(browser, "cat -Cat")  # SigLIP reads both as the same text
        assert browser.run(COUNT).startswith("All relevant images are left out")
        assert browser.run("document.getElementById('note').hidden")


def test_a_command_that_answers_again_is_believed(browser: Browser, root: Path) -> None:
    with browse(root) as url:
        show(browser, url)
        network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        browser.command("Network.enable", {})
        try:
            browser.command("Network.emulateNetworkConditions", {**network, "offline": True})
            browser.wait(f"{NOTE}.includes('does not answer')")
        finally:
            browser.command("Network.emulateNetworkConditions", {**network, "offline": False})
        browser.wait("document.getElementById('note').hidden")


def test_nothing_is_cut_off_in_the_dialogs_on_a_narrow_screen(browser: Browser, root: Path) -> None:
    with browse(root) as url:
        show(browser, url, 320, 640)
        browser.run("document.getElementById('grid').focus()")
        send(browser, Keys.SPACE)
        browser.wait(f"{SELECTED} === '1 selected'")
        for name in ("answer", "export"):
            browser.find(f"#{name}").click()
            sizes = browser.run(
                "(({scrollWidth, clientWidth}) => [scrollWidth, clientWidth])(arguments[0])",
                browser.find("dialog[open]"),
            )
            assert sizes[0] <= sizes[1]
            send(browser, Keys.ESCAPE)
