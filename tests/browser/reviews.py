"""Helpers for tests of the review page: start it, press keys, read what is on disk, be another tab."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from selenium.webdriver.common.action_chains import ActionChains

from tests.support.chromium import Browser

PHONE = (390, 844)


@contextmanager
def review(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `sightline review`, on a free port by default. Yields its URL and its process, and kills it in the end."""
    command = [sys.executable, "-m", "sightline", "review", str(folder), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = ""
            while "ready: " not in line:
                line = process.stdout.readline()
                assert line, "sightline review has ended"
            yield line.rpartition("ready: ")[2].strip(), process
        finally:
            process.kill()


def current(browser: Browser, row: int | None = None) -> int:
    """The row of the single question whose picture is on the screen, after it has become `row` if that is given."""
    expected = "true" if row is None else f"document.getElementById('image').dataset.row === '{row}'"
    browser.wait(f"document.querySelector('#one:not([hidden]) #image.shown') && {expected}")
    return int(browser.run("document.getElementById('image').dataset.row"))


def send(browser: Browser, *keys: str) -> None:
    """Press keys one after the other, and wait for nothing."""
    ActionChains(browser.driver).send_keys(*keys).perform()


def press(browser: Browser, key: str) -> int:
    """Press a key, and wait for another question or the end. Returns the row of the question before."""
    before = current(browser)
    send(browser, key)
    other = f"document.getElementById('image').dataset.row !== '{before}'"
    browser.wait(f"document.getElementById('one').hidden || (document.querySelector('#image.shown') && {other})")
    return before


def read_lines(folder: Path, count: int, name: str = "answers.jsonl") -> list[dict[str, Any]]:
    """Read the answers on disk, as soon as there are `count`."""
    for _ in range(500):
        lines = [json.loads(line) for line in (folder / name).read_text().split("\n") if line]
        if len(lines) >= count:
            return lines
        time.sleep(0.02)
    raise AssertionError(f"{len(lines)} answers of {count}")


def answer_elsewhere(url: str, row: int, answer: str) -> None:
    """Answer a question as another tab does that was opened just before."""
    with httpx2.Client(base_url=url) as client:
        page = client.get("/api/sample").json()
        body = {"review": page["review"], "since": 0, "answers": [{"row": row, "answer": answer, "version": 0}]}
        client.post("/api/answers", json=body).raise_for_status()


def stop_polling(browser: Browser) -> None:
    """Keep the page from learning what other tabs answer, as if it had asked just before they did."""
    browser.run(
        "void (() => { const real = window.fetch; window.fetch = (url, ...more) =>"
        " String(url).startsWith('/api/changes') ? new Promise(() => {}) : real(url, ...more); })()"
    )
