"""A client's string inside a message, a log line or a header: cut to a bound, in one line, as valid text.

A request may hold a string of megabytes, compressed to kilobytes. Whatever repeats it multiplies it. Control characters
and line breaks would forge log lines, and lone surrogates cannot be sent as UTF-8.
"""

from __future__ import annotations

QUOTED_CHARACTERS = 100
"""Characters of a client's string that a message repeats."""


def quote(text: str, limit: int = QUOTED_CHARACTERS) -> str:
    """Return a client's string in quotes, as `shorten` returns it."""
    return f"'{shorten(text, limit)}'"


def shorten(text: str, limit: int = QUOTED_CHARACTERS) -> str:
    r"""Return the first `limit` characters of `text` in one line and, if it is longer, how many characters it has.

    Characters without a visible form, such as control characters, line breaks, marks that change the direction of a
    line, and lone surrogates, are written as escapes: `\n`, `\u202e`. The result therefore has at most 10 characters
    for each of `limit`, and about 30 more.
    """
    start = text[:limit]
    if not start.isprintable():
        start = "".join(char if char.isprintable() else _escape(char) for char in start)
    return start if len(text) <= limit else f"{start}... ({len(text):,} characters)"


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
