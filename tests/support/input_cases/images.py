"""Cases of the section "Images"."""

from __future__ import annotations

from tests.support.input_cases.case import InputCase

TITLE = "Images"
TEXT = ""
CASES: tuple[InputCase, ...] = ()
