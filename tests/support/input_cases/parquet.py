"""Cases of the section "Parquet files"."""

from __future__ import annotations

from tests.support.input_cases.case import InputCase

TITLE = "Parquet files"
TEXT = ""
CASES: tuple[InputCase, ...] = ()
