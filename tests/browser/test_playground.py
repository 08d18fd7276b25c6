"""The playground, the page at /, in a real Chromium with the real application."""

from __future__ import annotations

import base64
import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from serve.admission.auth import new_key
from sightline.demo.shapes import LABELS, render
from tests.conftest import require
from tests.support.chromium import Browser
from tests.support.endpoint import Endpoint, make_config, run_endpoint

pytestmark = pytest.mark.browser

LABEL_SETS = {
    "shapes": {"names": list(LABELS), "templates": ["a photo of a {label}"], "threshold": 0.05, "top_k": 3},
    "colours": ["red", "green", "blue"],
}
SCORED = "document.querySelectorAll('.score').length && !document.querySelector('.busy, .stale')"
PHONE = (360, 740)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with run_endpoint(make_config(label_sets=LABEL_SETS, limits={"labels": 100})) as running:
        yield running


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of some labels, a truncated image, and a file that is not an image."""
    folder = tmp_path_factory.mktemp("images")
    for label in ("blue square", "green star"):
        render(label, random.Random(3), (200, 120)).save(folder / f"{label}.png")
    (folder / "broken.png").write_bytes((folder / "blue square.png").read_bytes()[:150])
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for screenshots. pytest keeps its last three temporary folders."""
    return tmp_path_factory.mktemp("screenshots")


def open_page(browser: Browser, endpoint: Endpoint, width: int = 1280, height: int = 900, **media: str) -> None:
    browser.open(endpoint.url, width, height, **media)
    browser.wait("!document.getElementById('model').hidden")


def classify(browser: Browser, image: Path, labels: str) -> list[tuple[str, str]]:
    """Choose an image, type labels, press the button. Returns the labels and scores that are shown, best first."""
    browser.find("#file").send_keys(str(image))
    browser.wait("document.getElementById('preview').naturalWidth")
    browser.find("#labels").clear()
    browser.find("#labels").send_keys(labels)
    browser.find("#go").click()
    return read_scores(browser)


def read_scores(browser: Browser) -> list[tuple[str, str]]:
    browser.wait(SCORED)
    rows = browser.find_all(".score")
    return [
        (row.find_element("class name", "score-label").text, row.find_element("class name", "score-number").text)
        for row in rows
    ]


def read_error(browser: Browser) -> str:
    browser.wait("document.getElementById('error').textContent")
    return browser.find("#error").text


def test_the_scores_of_a_chosen_image_and_typed_labels_are_shown(
    browser: Browser, endpoint: Endpoint, images: Path, shots: Path
) -> None:
    open_page(browser, endpoint)
    labels = ["red circle", "blue square", "green star", "blue circle"]
    shown = classify(
        browser, images / "blue square.png", "red circle, blue square\n green star,,\nblue circle, red circle"
    )
    assert shown[0][0] == "blue square"
    assert sorted(label for label, _ in shown) == sorted(labels)  # each label once, although one was typed twice
    # The page shows the same numbers as another client gets.
    files = {"image": (images / "blue square.png").read_bytes()}
    response = httpx2.post(f"{endpoint.url}/v1/classify", files=files, data={"labels": labels}).json()
    scores = {item["label"]: item["score"] for item in response["data"][0]["labels"]}
    for label, number in shown:
        assert number == ("under 0.001" if scores[label] < 0.001 else f"{scores[label]:.3f}")
    # The bars have the same values on the screen and for a screen reader.
    browser.wait("document.getAnimations().length === 0")
    for meter in browser.find_all(".meter"):
        score = scores[meter.get_attribute("aria-label") or ""]
        assert float(meter.get_attribute("aria-valuenow") or "nan") == pytest.approx(score)
        bar = meter.find_element("tag name", "span")
        assert bar.size["width"] == pytest.approx(max(3, score * meter.size["width"]), abs=2)
    assert "blue square" in browser.find("#status").get_attribute("textContent")  # type: ignore[operator]
    assert browser.find("#timing").text.endswith(" ms")
    assert "forward" in browser.find("#stages").text
    assert "blue square.png, 200 × 120" in browser.find("#about-image").text
    browser.screenshot(shots / "desktop-light.png")
    browser.resize(1280, 900, prefers_color_scheme="dark")
    browser.screenshot(shots / "desktop-dark.png")
    assert browser.complaints() == []


def test_one_click_tags_the_sample_image(browser: Browser, endpoint: Endpoint) -> None:
    open_page(browser, endpoint)
    browser.find("#sample").click()
    shown = read_scores(browser)
    assert shown[0][0] == "red circle"
    assert float(shown[0][1]) > 0.5


def test_a_registered_label_set_can_be_chosen(browser: Browser, endpoint: Endpoint, images: Path) -> None:
    open_page(browser, endpoint)
    browser.find("#file").send_keys(str(images / "green star.png"))
    browser.find("input[value=set]").click()
    assert "and 40 more" in browser.find("#set-labels").text
    assert not browser.find("#labels").is_displayed()
    browser.find("#go").click()
    shown = read_scores(browser)
    assert shown[0][0] == "green star"
    assert len(shown) <= 3
    Select(browser.find("#label-set")).select_by_value("colours")
    assert browser.find("#set-labels").text == "red, green, blue"
    assert browser.run("document.querySelector('.stale') !== null")  # the scores that are shown belong to another query
    browser.find("#go").click()
    assert read_scores(browser)[0][0] == "green"


def test_top_k_softmax_and_threshold_can_be_set(browser: Browser, endpoint: Endpoint, images: Path) -> None:
    open_page(browser, endpoint)
    browser.find("summary").click()
    browser.find("#top-k").send_keys("2")
    browser.find("#softmax").click()
    shown = classify(browser, images / "green star.png", "green star, red star, blue star")
    assert len(shown) == 2
    assert "add up to 1" in browser.find("#scores-note").text
    browser.find("#threshold").send_keys("1")
    browser.find("#go").click()
    browser.wait("document.getElementById('scores-note').textContent.startsWith('No label reached')")
    assert browser.find_all(".score") == []
    browser.find("#threshold").send_keys("2")  # the field now contains 12
    browser.find("#go").click()
    assert read_error(browser) == "The lowest score is a number from 0 to 1."
    assert browser.run("document.activeElement.id") == "threshold"


# The width of the focused element's outline; for a file input, of the element that it covers.
OUTLINE = """((focused) => Math.max(...[focused, focused.parentElement, focused.nextElementSibling].filter(Boolean)
  .map((one) => getComputedStyle(one))
  .map((style) => (style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth)))))(document.activeElement)"""


def test_the_page_can_be_used_by_keyboard_alone(browser: Browser, endpoint: Endpoint) -> None:
    open_page(browser, endpoint)
    seen: list[str] = []

    def press(*keys: str) -> None:
        ActionChains(browser.driver).send_keys(*keys).perform()

    def press_with_control(key: str) -> None:
        ActionChains(browser.driver).key_down(Keys.CONTROL).send_keys(key).key_up(Keys.CONTROL).perform()

    def tab_to(name: str) -> None:
        for _ in range(20):
            press(Keys.TAB)
            seen.append(browser.run("document.activeElement.id"))
            width = browser.run(OUTLINE)
            assert width >= 2, f"no visible focus on {seen[-1]}"
            if seen[-1] == name:
                return
        raise AssertionError(f"{name} is not reached by the tab key: {seen}")

    tab_to("file")
    tab_to("sample")
    press(Keys.ENTER)
    assert read_scores(browser)[0][0] == "red circle"
    tab_to("labels")
    press_with_control("a")
    press("yellow heart, red circle, purple ring")
    press_with_control(Keys.ENTER)
    assert len(read_scores(browser)) == 3
    tab_to("go")
    press(Keys.ENTER)
    assert read_scores(browser)[0][0] == "red circle"
    tab_to("numbers")
    tab_to("curl")
    # The arrow keys switch from own labels to the label sets.
    browser.run("document.querySelector('input[value=own]').focus()")
    press(Keys.ARROW_RIGHT)
    assert browser.find("#label-set").is_displayed()


def test_the_page_fits_a_phone(browser: Browser, endpoint: Endpoint, images: Path, tmp_path: Path, shots: Path) -> None:
    open_page(browser, endpoint, *PHONE)

    def overflow() -> Any:
        return browser.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    assert overflow() == 0
    browser.screenshot(shots / "phone-empty.png")
    long = tmp_path / f"{'a-very-long-name-without-any-space' * 5}.png"
    shutil.copy(images / "green star.png", long)
    shown = classify(browser, long, f"green star, {'x' * 200}, a label of many words that has to be broken into lines")
    assert shown[0][0] == "green star"
    # The scores are below the form, so the page scrolls to them. A click during the scrolling would stop it.
    browser.wait("Math.abs(document.getElementById('results').getBoundingClientRect().top) < innerHeight / 2")
    browser.find("summary").click()
    assert overflow() == 0
    small = [
        element.get_attribute("id") or element.text
        for element in browser.find_all("button, select, textarea, input:not([type=radio], [type=checkbox])")
        if element.is_displayed() and element.size["height"] < 36
    ]
    assert small == []
    browser.screenshot(shots / "phone-light.png")
    browser.resize(*PHONE, prefers_color_scheme="dark")
    browser.screenshot(shots / "phone-dark.png")


def test_each_error_is_shown_with_an_explanation(
    browser: Browser, endpoint: Endpoint, images: Path, shots: Path
) -> None:
    open_page(browser, endpoint)
    browser.find("#go").click()
    assert read_error(browser) == "Choose an image first, or try the sample."
    assert browser.run("document.activeElement.id") == "file"
    browser.find("#file").send_keys(str(images / "notes.txt"))
    browser.wait("document.getElementById('error').textContent.includes('notes.txt is not an image')")
    browser.find("#file").send_keys(str(images / "blue square.png"))
    browser.find("#go").click()
    browser.wait("document.getElementById('error').textContent.startsWith('Type at least one label')")
    browser.find("#file").send_keys(str(images / "broken.png"))
    browser.wait("document.getElementById('about-image').textContent.startsWith('broken.png')")
    browser.find("#labels").send_keys("red circle")
    browser.find("#go").click()
    browser.wait("document.getElementById('error').textContent.startsWith('The image ends early')")
    browser.screenshot(shots / "error.png")
    browser.find("#file").send_keys(str(images / "blue square.png"))
    browser.run("document.getElementById('labels').value = [...Array(200).keys()].map(n => 'label ' + n).join()")
    browser.find("#go").click()
    browser.wait("document.getElementById('error').textContent.includes('the limit is 100')")
    browser.find("#labels").clear()
    browser.find("#labels").send_keys("blue square, red circle")
    browser.find("#go").click()
    assert read_scores(browser)[0][0] == "blue square"
    assert browser.find("#error").text == ""


def test_a_stopped_server_is_reported(browser: Browser, images: Path) -> None:
    with run_endpoint(make_config(label_sets={})) as stopped:
        open_page(browser, stopped)
        assert not browser.find("#source").is_displayed()  # no label set is registered
        browser.find("#file").send_keys(str(images / "blue square.png"))
        browser.find("#labels").send_keys("blue square")
    browser.find("#go").click()
    assert read_error(browser) == "The server cannot be reached. Is it still running?"
    assert browser.find("#go").get_attribute("aria-disabled") == "false"


def test_the_page_asks_for_an_api_key_and_keeps_it_only_in_the_tab(
    browser: Browser, tmp_path: Path, shots: Path
) -> None:
    key, line = new_key("tester")
    (tmp_path / "keys").write_text(line)
    auth = {"keys_file": str(tmp_path / "keys"), "requests_per_minute": 4}
    with run_endpoint(make_config(label_sets=LABEL_SETS, auth=auth)) as guarded:
        browser.open(guarded.url)
        browser.wait("document.activeElement.id === 'key'")
        browser.screenshot(shots / "key.png")
        browser.find("#key").send_keys("sl-wrong", Keys.ENTER)
        browser.wait("document.getElementById('access-error').textContent === 'This API key is not known'")
        assert browser.run("sessionStorage.length") == 0
        browser.find("#key").send_keys(key, Keys.ENTER)  # the wrong key is selected, so typing replaces it
        browser.wait("document.getElementById('access').hidden && !document.getElementById('source').hidden")
        browser.find("#sample").click()
        assert read_scores(browser)[0][0] == "red circle"
        assert browser.run("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]
        # The command contains the variable's name instead of the key.
        assert "$SIGHTLINE_API_KEY" in browser.find("#curl").text
        assert key not in browser.run("document.documentElement.outerHTML")
        browser.driver.refresh()
        browser.wait("!document.getElementById('model').hidden")  # the tab still has the key
        for _ in range(3):
            browser.find("#sample").click()
            browser.wait("document.getElementById('go').getAttribute('aria-disabled') === 'false'")
        error = read_error(browser)
        assert "4 requests a minute" in error
        assert "Try again in" in error


def test_the_page_loads_nothing_from_other_hosts(browser: Browser, endpoint: Endpoint, images: Path) -> None:
    open_page(browser, endpoint)
    classify(browser, images / "blue square.png", "blue square")
    browser.wait("!document.getElementById('embedding').hidden")
    urls = browser.requests()
    assert {url.removeprefix(endpoint.url) for url in urls} >= {
        "/",
        "/playground/style.css",
        "/playground/app.js",
        "/v1/models",
        "/v1/label-sets",
        "/v1/classify",
        "/v1/embeddings",
    }
    assert [url for url in urls if not url.startswith((f"{endpoint.url}/", "data:", "blob:"))] == []
    assert browser.complaints() == []  # the content security policy blocked nothing
    headers = httpx2.get(endpoint.url).headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]


def test_the_reference_loads_nothing_from_other_hosts(browser: Browser, endpoint: Endpoint, shots: Path) -> None:
    open_page(browser, endpoint)
    browser.find("nav a").click()
    browser.wait("document.querySelectorAll('.opblock').length >= 8")
    shown = browser.find("#reference").text
    for path in ("/v1/embeddings", "/v1/classify", "/v1/label-sets"):
        assert path in shown
    browser.find("[data-path='/v1/classify'] button, .opblock-summary-control").click()
    browser.wait("document.querySelector('.opblock-body .responses-table')")
    browser.screenshot(shots / "reference.png")
    assert [url for url in browser.requests() if not url.startswith((f"{endpoint.url}/", "data:", "blob:"))] == []
    assert browser.complaints() == []


def test_the_curl_command_gets_the_same_scores(
    browser: Browser, endpoint: Endpoint, images: Path, tmp_path: Path
) -> None:
    require("curl", None if shutil.which("curl") else "apt-get install curl")
    open_page(browser, endpoint)
    image = tmp_path / 'it\'s; a, "blue" $HOME.png'
    shutil.copy(images / "blue square.png", image)
    browser.find("summary").click()
    browser.find("#threshold").send_keys("0.0001")
    labels = ["blue square", "@home", "<b>", 'it\'s `ls` $(ls) "quoted"', "semi;type=colon", "back\\slash", "grün"]
    shown = classify(browser, image, "\n".join(labels))
    command = browser.run("document.getElementById('curl').textContent")
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)["data"][0]["labels"]
    assert [item["label"] for item in found] == [label for label, _ in shown]
    assert found[0]["label"] == "blue square"
    browser.find("input[value=set]").click()
    browser.find("#go").click()
    shown = read_scores(browser)
    command = browser.run("document.getElementById('curl').textContent")
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [item["label"] for item in json.loads(done.stdout)["data"][0]["labels"]] == [label for label, _ in shown]


def test_texts_are_copied_to_the_clipboard(browser: Browser, endpoint: Endpoint, images: Path) -> None:
    open_page(browser, endpoint)
    browser.command(
        "Browser.grantPermissions",
        {"origin": endpoint.url.rstrip("/"), "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
    )
    classify(browser, images / "blue square.png", "blue square")
    browser.wait("!document.getElementById('embedding').hidden")
    browser.find("[data-copy=vector]").click()
    browser.wait("document.querySelector('[data-copy=vector]').textContent === 'Copied'")
    vector = json.loads(browser.run("navigator.clipboard.readText()"))
    assert sum(number**2 for number in vector) == pytest.approx(1, abs=1e-3)
    shown = [float(number) for number in browser.find("#numbers").text.strip("[]").split(", ")[:12]]
    assert shown == pytest.approx(vector[:12], abs=1e-4)
    assert f"{len(vector)} in all" in browser.find("#numbers").text
    browser.find("[data-copy=curl]").click()
    browser.wait("document.querySelector('[data-copy=curl]').textContent === 'Copied'")
    assert browser.run("navigator.clipboard.readText()") == browser.run("document.getElementById('curl').textContent")


INSERT_FILE = """(async (kind, data, name) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: "image/png" }));
  const options = { bubbles: true, cancelable: true };
  if (kind === "paste") {
    document.body.dispatchEvent(new ClipboardEvent("paste", { ...options, clipboardData: transfer }));
    return;
  }
  for (const step of ["dragenter", "dragover"]) {
    document.body.dispatchEvent(new DragEvent(step, { ...options, dataTransfer: transfer }));
  }
  if (!document.getElementById("drop").classList.contains("over")) throw new Error("the drop zone is not highlighted");
  document.body.dispatchEvent(new DragEvent("drop", { ...options, dataTransfer: transfer }));
  if (document.getElementById("drop").classList.contains("over")) throw new Error("the drop zone stays highlighted");
})(...arguments)"""


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_an_image_can_be_pasted_and_dropped(kind: str, browser: Browser, endpoint: Endpoint, images: Path) -> None:
    open_page(browser, endpoint)
    data = base64.b64encode((images / "green star.png").read_bytes()).decode()
    browser.run(INSERT_FILE, kind, data, "inserted.png")
    browser.wait("document.getElementById('about-image').textContent.startsWith('inserted.png, 200')")
    browser.find("#labels").send_keys("red star, green star")
    browser.find("#go").click()
    assert read_scores(browser)[0][0] == "green star"


# The contrast ratio of WCAG 2, against the nearest opaque background.
CONTRAST = """(() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const color = parse(getComputedStyle(one).backgroundColor);
      if (color.length < 4 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    const [a, b] = [luminance(parse(getComputedStyle(element).color)), luminance(behind(element))];
    found[element.id || element.className || element.tagName] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }
  return found;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(scheme: str, browser: Browser, endpoint: Endpoint, images: Path) -> None:
    open_page(browser, endpoint, prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    classify(browser, images / "blue square.png", "blue square, red circle")
    browser.wait("!document.getElementById('embedding').hidden")
    browser.find("#labels").clear()
    browser.find("#go").click()
    read_error(browser)
    browser.find("#labels").send_keys("blue square, red circle")
    browser.find("#go").click()
    browser.wait(SCORED)
    browser.run("document.getElementById('error').textContent = 'An error.'")
    ratios = browser.run(CONTRAST)
    assert {"error", "go", "timing", "score-label", "score-number", "sample", "numbers"} <= set(ratios)
    assert {name: round(ratio, 2) for name, ratio in ratios.items() if ratio < 4.5} == {}


def test_reduced_motion_disables_the_animation(browser: Browser, endpoint: Endpoint) -> None:
    open_page(browser, endpoint, prefers_reduced_motion="reduce")
    browser.find("#sample").click()
    read_scores(browser)
    assert browser.run("getComputedStyle(document.querySelector('.meter span')).transitionDuration") == "0s"


def test_the_api_reference_takes_an_api_key_and_sends_it(browser: Browser, tmp_path: Path, shots: Path) -> None:
    key, line = new_key("tester")
    (tmp_path / "keys").write_text(line)
    with run_endpoint(make_config(auth={"keys_file": str(tmp_path / "keys")})) as guarded:
        browser.open(f"{guarded.url}/docs#/models/list_models_v1_models_get")
        browser.wait("document.querySelector('.btn.authorize')")
        browser.find(".btn.authorize").click()
        browser.wait("document.querySelector('.auth-container input')")
        browser.find(".auth-container input").send_keys(key)
        browser.find(".auth-container .btn.authorize").click()
        browser.find(".btn-done").click()
        browser.wait("document.querySelector('.try-out__btn')")
        browser.find(".try-out__btn").click()
        browser.wait("document.querySelector('.execute')")
        browser.find(".execute").click()
        browser.wait("document.querySelector('.live-responses-table .response-col_status')")
        browser.screenshot(shots / "reference.png")
        assert browser.find(".live-responses-table tbody .response-col_status").text.startswith("200")
