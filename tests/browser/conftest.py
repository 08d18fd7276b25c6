"""One Chromium for the tests of each file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import require
from tests.support.chromium import Browser, why_not


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A real browser, with a new profile."""
    require("browser", why_not())
    chromium = Browser(tmp_path_factory.mktemp("chromium"))
    yield chromium
    chromium.quit()
