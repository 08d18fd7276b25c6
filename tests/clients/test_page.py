"""`docs/clients.md` is made of the calls that the tests make."""

from __future__ import annotations

from tests.support.clients.calls import CALLS
from tests.support.clients.page import PAGE, write_page


def test_the_page_is_made_of_the_calls() -> None:
    """`python -m tests.support.clients.page` writes the page anew."""
    assert PAGE.read_text(encoding="utf-8") == write_page()


def test_each_call_on_the_page_is_a_test() -> None:
    write_page()
    names = [call.test for call in CALLS]
    assert len(names) >= 40
    assert all(name.startswith("test_") for name in names)
