"""Dates in inputs: a placeholder such as `{date:%Y/%m/%d}` stands for the folders of some days."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta

from storage.settings import ConfigError
from storage.store import show

_PLACEHOLDER = re.compile(r"\{date(?::([^{}]*))?\}")
_DIRECTIVES = re.compile(r"%(.?)", re.DOTALL)
_DATE_DIRECTIVES = "YymdjGVu%"
# The directives that say something about a day in digits. Others depend on the language of the machine, or are of a
# time, which a date does not have.


def expand_dates(inputs: Sequence[str], dates: Sequence[date]) -> list[str]:
    """Replace each placeholder in the inputs by each date, and return the inputs in order, each once.

    `{date}` becomes the ISO date, such as 2026-01-02, and `{date:%Y/%m/%d}` what the format of `strftime` says. All
    placeholders of an input get the same date. Other braces are part of the name, and an input without a placeholder is
    returned as it is. Raises `ConfigError` for a format with a directive that is no number of a date.
    """
    found: dict[str, None] = {}
    for one in inputs:
        _check_formats(one)
        days = dates if _PLACEHOLDER.search(one) else [date.min]
        found |= dict.fromkeys(_fill(one, day) for day in days)
    return list(found)


def fixed_part(one: str) -> str | None:
    """Return the folder of an input that holds the folders of all days, or None for an input without a placeholder."""
    found = _PLACEHOLDER.search(one)
    return one[: found.start()].rpartition("/")[0] or "/" if found else None


def default_dates(now: datetime) -> list[date]:
    """Return yesterday and today in UTC. `now` has a time zone.

    Yesterday is one of them because objects are still stored in its folder after the last run of that day.
    """
    today = now.astimezone(UTC).date()
    return [today - timedelta(days=1), today]


def _check_formats(one: str) -> None:
    for match in _PLACEHOLDER.finditer(one):
        if match[1] is None:
            continue
        directives = _DIRECTIVES.findall(match[1])
        wrong = next((name for name in directives if not name or name not in _DATE_DIRECTIVES), None)
        if wrong is not None or not directives:
            problem = "has no directive" if wrong is None else f"has the directive %{wrong}"
            raise ConfigError(
                f"input: {show(one)}: the format of {show(match[0])} {problem}: use %Y, %m and %d, such as "
                "{date:%Y/%m/%d}"
            )


def _fill(one: str, day: date) -> str:
    return _PLACEHOLDER.sub(lambda match: _format(day, match[1]), one)


def _format(day: date, text: str | None) -> str:
    if text is None:
        return day.isoformat()
    # On Linux, `strftime` writes the years before 1000 with fewer than four digits.
    return _DIRECTIVES.sub(lambda match: f"{day.year:04d}" if match[1] == "Y" else day.strftime(match[0]), text)
