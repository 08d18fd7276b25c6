"""The report, in a real Chromium: by keyboard, on a phone, with a thousand labels."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from typer.testing import CliRunner

from curation.report.page import write_report
from curation.report.statistics import compute_statistics
from sightline.cli import app
from tests.support.chromium import Browser
from tests.support.outputs import make_output

pytestmark = pytest.mark.browser
PHONE = (360, 740)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thousand")
    output = make_output(folder / "made", 1000)
    return write_report(output, compute_statistics(output), folder / "report.html")[0]


def test_the_report_by_keyboard(browser: Browser, thousand: Path) -> None:
    browser.open(thousand.as_uri())
    keys = ActionChains(browser.driver)
    keys.send_keys("j", "j", "k", "j").perform()
    browser.wait("document.activeElement.id === 'label-2'")  # a busy browser handles keys later
    browser.wait("Math.abs(document.activeElement.getBoundingClientRect().top) < 60")
    ActionChains(browser.driver).send_keys("/").perform()
    browser.wait("document.activeElement.id === 'search'")
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


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of four labels with everything on it: steps, an evaluation with curves, an audit; and with long keys."""
    folder = tmp_path_factory.mktemp("judged")
    output = make_output(folder / "made", 4, key=lambda row: f"{'a long folder/' * 9}{row}.jpg")
    sample = folder / "sample"
    run("sample", output.uri, sample, "--per-label", 60, "--for", "evaluation")
    rows = pq.read_table(sample / "sample.parquet").drop_columns(["thumbnail"]).to_pylist()
    said = [
        {**row, "answer": "right" if row["score"] > 0.2 or number % 9 == 0 else "wrong"}
        for number, row in enumerate(rows)
    ]
    (sample / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    told = run("evaluate", output.uri, "--truth", sample, "--json")
    (folder / "evaluation.json").write_text(told)
    page = folder / "report.html"
    run(
        "report",
        output.uri,
        "--to",
        page,
        "--evaluation",
        folder / "evaluation.json",
        "--sample",
        sample,
        "--audit",
        sample,
    )
    return page


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_with_an_evaluation_fits_the_window(browser: Browser, judged: Path, width: int) -> None:
    browser.open(judged.as_uri(), width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.run("document.querySelectorAll('.label').forEach((one) => (one.style.contentVisibility = 'visible'))")
    # No text is wider than its box, except in the table, which scrolls.
    wide = """[...document.querySelectorAll('main :not(.scroll, .scroll *, svg, svg *)')]
      .filter((one) => one.clientWidth && one.scrollWidth > one.clientWidth + 1).map((one) => one.className)"""
    assert browser.run(wide) == []
    # Numbers of a chart's axes stand in the chart, and do not overlap.
    overlaps = """[...document.querySelectorAll('svg.chart')].filter((chart) => {
      const boxes = [...chart.querySelectorAll('text')].map((text) => text.getBoundingClientRect());
      const outer = chart.getBoundingClientRect();
      return boxes.some((a, i) => a.left < outer.left - 1 || a.right > outer.right + 1 || boxes.some((b, j) =>
        i < j && a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3));
    }).length"""
    assert browser.run(overlaps) == 0
    assert browser.run("document.querySelectorAll('svg.chart').length") >= 8
    keys = browser.run("[...document.querySelectorAll('.key')].map((one) => [one.textContent, one.title])")
    assert keys
    assert all(len(text) <= 30 < len(title) and text[-8:] == title[-8:] for text, title in keys)
    Select(browser.find("#sort")).select_by_visible_text("lowest precision")
    values = browser.run(
        "[...document.querySelectorAll('#index tbody tr')].map((row) => Number(row.dataset.precision))"
    )
    assert values == sorted(values)
    assert browser.complaints() == []


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
