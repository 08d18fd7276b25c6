"""The search of the playground in a real Chromium: it is there where an output is searched, and shows what it found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.support.select import Select

from tests.support.chromium import Browser
from tests.support.endpoint import Endpoint, make_config, run_endpoint
from tests.support.searched_output import make_shapes, write_shapes

pytestmark = pytest.mark.browser

SEARCHED = "!document.querySelector('.search.busy') && document.getElementById('search-note').textContent"
LOADED = "[...document.querySelectorAll('#found img')].every((one) => one.complete && one.naturalWidth)"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    output = write_shapes(tmp_path_factory.mktemp("searched") / "tags")
    with run_endpoint(make_config(search={"output": output.uri})) as running:
        yield running


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for screenshots. pytest keeps its last three temporary folders."""
    return tmp_path_factory.mktemp("search-screenshots")


def open_page(browser: Browser, endpoint: Endpoint, width: int = 1280, **media: str) -> None:
    browser.open(endpoint.url, width, 900, **media)
    browser.wait("!document.getElementById('model').hidden")


def search(browser: Browser, text: str) -> list[str]:
    """Search for a text. Returns the keys of the images that are shown."""
    browser.run("document.getElementById('search-note').textContent = ''")
    browser.find("#search-text").clear()
    browser.find("#search-text").send_keys(text)
    browser.find("#search-go").click()
    return read_keys(browser)


def read_keys(browser: Browser) -> list[str]:
    browser.wait(SEARCHED)
    browser.wait(LOADED)
    return [tile.text for tile in browser.find_all(".tile-key")]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_images_that_were_found_are_shown_with_their_scores(
    browser: Browser, endpoint: Endpoint, shots: Path, width: int, scheme: str
) -> None:
    open_page(browser, endpoint, width, prefers_color_scheme=scheme)
    keys = search(browser, "red circle")
    found = endpoint.post("/v1/search", {"text": "red circle", "top": 40}).json()["data"]
    assert keys == [row["key"] for row in found]
    assert [one.text for one in browser.find_all(".tile .score-number")] == [f"{row['score']:.3f}" for row in found]
    assert "240 images searched, 12 are relevant; 12 are shown." in browser.find("#search-note").text
    assert browser.find("#search-size").text == "240 images"
    assert browser.run("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the page"
    browser.run("document.getElementById('search').scrollIntoView()")
    browser.screenshot(shots / f"search-{width}-{scheme}.png")
    assert browser.complaints() == []


def test_nothing_relevant_options_and_images_like_another(browser: Browser, endpoint: Endpoint) -> None:
    open_page(browser, endpoint)
    assert search(browser, "orange heart") == []
    assert "none of them is relevant" in browser.find("#search-note").text
    browser.find("#search summary").click()
    browser.find("#search-all").click()
    assert len(search(browser, "red")) == 40
    browser.find("#search-not").send_keys("red circle")
    assert not [key for key in search(browser, "red") if key.startswith("red circle/")]
    assert "were left out" in browser.find("#search-note").text
    browser.find("#search-not").clear()
    Select(browser.find("#search-label")).select_by_value("blue star")
    assert {key.partition("/")[0] for key in search(browser, "red")} == {"blue star"}
    own = browser.find(".tile-key").text
    browser.run("document.getElementById('search-note').textContent = ''")
    browser.find(".tile-like").click()
    like = read_keys(browser)
    assert own not in like
    assert {key.partition("/")[0] for key in like} == {"blue star"}
    assert f"Images like {own}." in browser.find("#search-note").text
    assert browser.find("#search-text").get_attribute("value") == ""


def test_an_empty_text_and_a_refusal_are_explained(browser: Browser, endpoint: Endpoint) -> None:
    open_page(browser, endpoint)
    browser.find("#search-go").click()
    browser.wait("document.getElementById('search-error').textContent")
    assert browser.find("#search-error").text == "Type what the images show."
    assert browser.run("document.activeElement.id") == "search-text"
    browser.find("#search-text").send_keys("x" * 300)
    browser.find("#search-go").click()
    browser.wait("document.getElementById('search-error').textContent.includes('characters')")


def test_without_thumbnails_and_without_a_searched_output(browser: Browser, tmp_path: Path) -> None:
    output = write_shapes(tmp_path / "tags", make_shapes(1, thumbnails=False))
    with run_endpoint(make_config(search={"output": output.uri})) as plain:
        open_page(browser, plain)
        assert search(browser, "red circle")
        assert browser.find(".tile-image").text == "no thumbnail"
    with run_endpoint(make_config()) as without:
        open_page(browser, without)
        assert not browser.find("#search").is_displayed()
