"""Characters of labels and prompts that cannot be seen, and what a label looks like without them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_IGNORABLE = (
    (0x00AD, 0x00AD),
    (0x034F, 0x034F),
    (0x061C, 0x061C),
    (0x115F, 0x1160),
    (0x17B4, 0x17B5),
    (0x180B, 0x180F),
    (0x200B, 0x200F),
    (0x202A, 0x202E),
    (0x2060, 0x206F),
    (0x3164, 0x3164),
    (0xFE00, 0xFE0F),
    (0xFEFF, 0xFEFF),
    (0xFFA0, 0xFFA0),
    (0xFFF0, 0xFFF8),
    (0x1BCA0, 0x1BCA3),
    (0x1D173, 0x1D17A),
    (0xE0000, 0xE0FFF),
)
"""First and last code point of the ranges of Unicode's property Default_Ignorable_Code_Point, which Python does not
have: `DerivedCoreProperties.txt` of Unicode 14."""
_PARTS_OF_WORDS = ((0x180B, 0x180F), (0x200C, 0x200D), (0xFE00, 0xFE0F), (0xE0100, 0xE01EF))
"""Those of them that belong to writing: joiners in Persian and Indic words and in emoji, Mongolian's selectors and
vowel separator, and the variation selectors of emoji and of Chinese characters."""
_WITHOUT_SHAPE = ((0x2800, 0x2800), (0xFFF9, 0xFFFC))
"""The empty Braille pattern, marks of annotations, and the place of an object. They have no shape of their own."""
_CATEGORIES = ("Cc", "Zl", "Zp")
"""Control characters, and separators of lines and paragraphs."""
_FLAG = re.compile("\U0001f3f4[\U000e0030-\U000e007a]+\U000e007f")
"""The flag of a region, such as Scotland's: a black flag and invisible letters, which spell the region."""


def find_invisible(text: str) -> str | None:
    """The first character that cannot be seen and that no word or emoji needs. None if there is none.

    Spaces count as visible. Of joiners and variation selectors only those at the start are found, where they join or
    vary nothing.
    """
    if text and _is_in(text[0], _PARTS_OF_WORDS):
        return text[0]
    for char in _FLAG.sub("", text):
        if _is_in(char, _PARTS_OF_WORDS):
            continue
        if _is_in(char, _IGNORABLE) or _is_in(char, _WITHOUT_SHAPE) or unicodedata.category(char) in _CATEGORIES:
            return char
    return None


def make_appearance(text: str) -> str:
    """The text in one form for all texts that look the same: NFC, single spaces, no joiners or variation selectors."""
    seen = "".join(char for char in text if not _is_invisible(char))
    return " ".join(unicodedata.normalize("NFC", seen).split())


def find_surrogate(text: str) -> str | None:
    """The first surrogate: half of a character, which cannot be written as UTF-8. None if there is none."""
    return next((char for char in text if "\ud800" <= char <= "\udfff"), None)


def _is_invisible(char: str) -> bool:
    """Whether two texts that differ only by this character look the same. The letters of a flag are compared."""
    return _is_in(char, _IGNORABLE) and not 0xE0020 <= ord(char) <= 0xE007F


def _is_in(char: str, ranges: Iterable[tuple[int, int]]) -> bool:
    return char > "\x7f" and any(first <= ord(char) <= last for first, last in ranges)
