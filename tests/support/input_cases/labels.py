"""Cases of the section "Label files"."""

from __future__ import annotations

from tests.support.input_cases.case import InputCase

TITLE = "Label files"
TEXT = ""
CASES: tuple[InputCase, ...] = ()
