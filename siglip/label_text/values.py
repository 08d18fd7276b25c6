"""Types of the values of a label set, for pydantic: what it would convert in silence is refused."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from siglip.label_text.characters import find_surrogate


def _check_text(value: Any) -> Any:
    if isinstance(value, str) and (half := find_surrogate(value)):
        raise ValueError(f"the text contains half of a character, U+{ord(half):04X}: write the character itself")
    return value


def _check_number(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic makes 1 of true
        raise ValueError(f"expected a number, not {str(value).lower()}")
    return value


Text = Annotated[str, BeforeValidator(_check_text)]
"""A text that can be written as UTF-8."""
Real = Annotated[float, BeforeValidator(_check_number)]
"""A number; `true` is none."""
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(_check_number)]
"""A number from 0 to 1; `true` is none."""
Count = Annotated[int, Field(ge=1), BeforeValidator(_check_number)]
"""A whole number from 1; `true` is none."""
