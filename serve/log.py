"""The endpoint's logger, below Ray Serve's: Ray Serve's handlers add the request id and write the replica's log file.

In a replica, a logger of any other name reaches no handler, and its messages are lost.
"""

from __future__ import annotations

import logging

from serve.http.quoting import shorten
from serve.rayserve.internals import LOGGER

MESSAGE_CHARACTERS = 2000
"""Longest message of a log line, and longest string beside it."""
TRACEBACK_CHARACTERS = 16_000
"""Longest traceback of a log line. The first and the last half of a longer one are kept."""


class OneBoundedLine(logging.Filter):
    """Bounds every record: its message and the strings beside it are one line, and its traceback is cut.

    It is the last of several protections: a log line may hold a client's string, also within an exception's text.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record in place. Always true."""
        record.msg, record.args = shorten(record.getMessage(), MESSAGE_CHARACTERS), ()
        for name, value in record.__dict__.items():
            if isinstance(value, str) and name not in ("msg", "exc_text"):
                record.__dict__[name] = shorten(value, MESSAGE_CHARACTERS)
        if record.exc_info and not record.exc_text:
            record.exc_text = _cut_traceback(logging.Formatter().formatException(record.exc_info))
        return True


def _cut_traceback(text: str) -> str:
    """Both ends of a traceback. Lone surrogates, which a log file in UTF-8 cannot have, become question marks."""
    if len(text) > TRACEBACK_CHARACTERS:
        half = TRACEBACK_CHARACTERS // 2
        text = f"{text[:half]}\n... ({len(text) - 2 * half:,} characters)\n{text[-half:]}"
    return text.encode("utf-8", "replace").decode()


log = logging.getLogger(f"{LOGGER}.sightline")
log.addFilter(OneBoundedLine())
