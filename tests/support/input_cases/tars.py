"""Cases of the section "Tars"."""

from __future__ import annotations

from tests.support.input_cases.case import InputCase

TITLE = "Tars"
TEXT = ""
CASES: tuple[InputCase, ...] = ()
