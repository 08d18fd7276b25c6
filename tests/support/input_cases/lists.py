"""Cases of the section "Lists of images"."""

from __future__ import annotations

from tests.support.input_cases.case import InputCase

TITLE = "Lists of images"
TEXT = ""
CASES: tuple[InputCase, ...] = ()
