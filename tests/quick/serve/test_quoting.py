"""A client's string in a message or a log line is cut, is one line and is valid text."""

from __future__ import annotations

import json
import logging

import pytest

from serve.http.errors import MESSAGE_CHARACTERS, PARAM_CHARACTERS, ApiError
from serve.http.quoting import quote, shorten
from serve.http.validation import describe_validation
from serve.log import MESSAGE_CHARACTERS as LOG_CHARACTERS
from serve.log import TRACEBACK_CHARACTERS, log

LONG = "x" * 3_000_000
ODD = "a\r\nb\0c\x1b[31m\u202e\u2028\ud800d"


@pytest.mark.parametrize("text", ["cat", "", "a label with spaces", "Katze é 猫 🐈"])
def test_a_short_readable_string_stays_as_it_is(text: str) -> None:
    assert shorten(text) == text
    assert quote(text) == f"'{text}'"


def test_a_long_string_is_cut_and_its_length_said() -> None:
    assert quote("x" * 100) == f"'{'x' * 100}'"
    assert quote(LONG) == f"'{'x' * 100}... (3,000,000 characters)'"
    assert len(shorten("\U000e0001" * 1000)) < 1100


def test_what_cannot_be_seen_is_escaped() -> None:
    assert shorten(ODD) == r"a\r\nb\x00c\x1b[31m\u202e\u2028\ud800d"


def test_an_errors_message_and_param_are_bounded_whoever_makes_them() -> None:
    error = ApiError("invalid_request", f"{LONG}: {ODD}", param=LONG)
    assert len(error.message) < MESSAGE_CHARACTERS + 50
    assert error.param is not None
    assert len(error.param) < PARAM_CHARACTERS + 50
    assert len(str(error)) < MESSAGE_CHARACTERS + 100
    odd = ApiError("invalid_request", ODD, param=ODD)
    json.dumps(odd.body(), ensure_ascii=False).encode()  # no lone surrogate
    assert "\n" not in odd.message


def test_the_name_of_an_unknown_field_is_cut() -> None:
    error = describe_validation([{"type": "extra_forbidden", "loc": (LONG,), "msg": "Extra inputs are not permitted"}])
    assert error.message == f"{'x' * 100}... (3,000,000 characters): no such field"
    assert error.param == f"{'x' * 100}... (3,000,000 characters)"


def test_a_log_record_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, log.name):
        log.info("a line %s", LONG + ODD, extra={"key": LONG, "code": ODD, "ms": 1.5, "stages_ms": {"decode": 1}})
        try:
            raise KeyError(LONG + ODD)
        except KeyError:
            log.exception("failed: %s", ODD)
    first, second = caplog.records
    assert len(first.getMessage()) < LOG_CHARACTERS + 50
    assert first.getMessage().startswith("a line xxx")
    assert len(first.__dict__["key"]) < LOG_CHARACTERS + 50
    assert first.__dict__["code"] == shorten(ODD)
    assert (first.__dict__["ms"], first.__dict__["stages_ms"]) == (1.5, {"decode": 1})
    assert second.getMessage() == f"failed: {shorten(ODD)}"
    assert second.exc_text is not None
    assert len(second.exc_text) < TRACEBACK_CHARACTERS + 100
    assert "KeyError" in second.exc_text
    formatted = logging.Formatter().format(second)
    assert len(formatted) < TRACEBACK_CHARACTERS + LOG_CHARACTERS
    formatted.encode()
