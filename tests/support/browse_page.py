"""The page of `sightline browse`, as tests in a browser use it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.support.chromium import Browser

POSITIONS = "[...document.querySelectorAll('.tile[data-position]')].map(tile => Number(tile.dataset.position))"
SHOWN = f"{POSITIONS}.sort((a, b) => a - b)"
COUNT = "document.getElementById('count').textContent"


@contextmanager
def browse(root: Path, *options: str) -> Iterator[str]:
    """Run `sightline browse` on a free port, in the folder that holds the output. Yields its URL, and ends it."""
    command = [sys.executable, "-m", "sightline", "browse", str(root), "--port", "0", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root.parent
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert "ready: " in line, line
            yield line.rpartition("ready: ")[2].strip()
        finally:
            process.terminate()
            process.wait(30)


def show(browser: Browser, url: str, width: int = 1280, height: int = 860, **media: str) -> None:
    browser.open(url, width, height, **media)
    browser.wait("document.querySelectorAll('.tile img.shown').length > 5")


def send(browser: Browser, *keys: str) -> None:
    ActionChains(browser.driver).send_keys(*keys).perform()


def search(browser: Browser, text: str) -> None:
    """Type into the search box, and wait for the result."""
    browser.run("document.getElementById('count').textContent = 'waiting'")
    box = browser.find("#q")
    box.clear()
    box.send_keys(text, Keys.ENTER)
    browser.wait(f"{COUNT} !== 'waiting'")
