"""Cases of the section "Folders and object stores"."""

from __future__ import annotations

from tests.support.input_cases.case import InputCase

TITLE = "Folders and object stores"
TEXT = ""
CASES: tuple[InputCase, ...] = ()
