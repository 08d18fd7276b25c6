"""Every kind of input in `docs/inputs.md`: built, planned, read and decoded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.input_cases.case import InputCase, read_case
from tests.support.input_cases.page import PAGE, SECTIONS, write_page

CASES = [pytest.param(case, id=f"{section.TITLE}: {case.kind}") for section in SECTIONS for case in section.CASES]


@pytest.mark.parametrize("case", CASES)
def test_an_input_is_treated_as_the_page_says(case: InputCase, tmp_path: Path) -> None:
    seen = read_case(case, tmp_path)
    if case.refused is not None:
        assert seen.refused is not None
        assert case.refused in seen.refused
        return
    assert (seen.refused, seen.tagged, seen.rejected, seen.skipped) == (
        None,
        case.tagged,
        dict(case.rejected),
        dict(case.skipped),
    )
    assert case.labels is None or seen.labels == case.labels


def test_the_page_is_made_of_the_cases() -> None:
    """`python -m tests.support.input_cases.page` writes the page anew."""
    assert PAGE.read_text(encoding="utf-8") == write_page()
