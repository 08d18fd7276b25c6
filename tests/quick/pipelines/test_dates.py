"""Dates in inputs: which placeholders are replaced, and what stays as it is."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone

import pytest

from pipelines.planning.dates import default_dates, expand_dates
from storage.settings import ConfigError

DAYS = [date(2025, 12, 31), date(2026, 1, 2)]


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        ("s3://b/in/{date}", ["s3://b/in/2025-12-31", "s3://b/in/2026-01-02"]),
        ("s3://b/{date:%Y/%m/%d}/x", ["s3://b/2025/12/31/x", "s3://b/2026/01/02/x"]),
        ("s3://b/dt={date:%Y%m%d}", ["s3://b/dt=20251231", "s3://b/dt=20260102"]),
        ("{date:%Y}/{date}.tar", ["2025/2025-12-31.tar", "2026/2026-01-02.tar"]),
        ("s3://b/{date:%G-W%V}", ["s3://b/2026-W01"]),  # both days are in one week
        ("s3://b/{date:%y.%j %%Y}", ["s3://b/25.365 %Y", "s3://b/26.002 %Y"]),
        ("s3://b/{date:東京 %d}", ["s3://b/東京 31", "s3://b/東京 02"]),
    ],
)
def test_placeholders_become_each_date(one: str, expected: list[str]) -> None:
    assert expand_dates([one], DAYS) == expected


@pytest.mark.parametrize(
    "one", ["s3://b/in", "{}", "{dates}", "{Date}", "{ date }", "a{b}c", "{date", "date}", "{%Y}", "{date-1}", "100%"]
)
def test_other_names_stay_as_they_are(one: str) -> None:
    assert expand_dates([one], DAYS) == [one]
    assert expand_dates([one], []) == [one]


def test_braces_around_a_placeholder_are_part_of_the_name() -> None:
    assert expand_dates(["{{date}}/{x}"], DAYS[:1]) == ["{2025-12-31}/{x}"]


def test_each_input_is_returned_once_and_in_order() -> None:
    inputs = ["b/{date:%Y}", "a", "b/2026", "a", "b/{date:%Y}"]
    assert expand_dates(inputs, [*DAYS, DAYS[1]]) == ["b/2025", "b/2026", "a"]
    assert expand_dates(["{date}"], []) == []


def test_years_have_four_digits() -> None:
    assert expand_dates(["{date:%Y} {date}"], [date(26, 1, 2)]) == ["0026 0026-01-02"]


@pytest.mark.parametrize(
    ("one", "message"),
    [
        ("{date:}", r"\{date:\} has no directive: use %Y, %m and %d"),
        ("{date:YYYY-MM}", "has no directive"),
        ("{date:%Y-%H}", "has the directive %H"),
        ("{date:%B}", "has the directive %B"),
        ("{date:%Y-%-m}", "has the directive %-"),
        ("{date:%Y%}", "has the directive %: use"),
    ],
)
def test_formats_that_are_no_numbers_of_a_date_are_refused(one: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand_dates([one], [])


def test_the_default_is_yesterday_and_today_in_utc() -> None:
    assert default_dates(datetime(2026, 1, 1, 0, 5, tzinfo=UTC)) == [date(2025, 12, 31), date(2026, 1, 1)]
    tokyo = timezone(timedelta(hours=9))
    assert default_dates(datetime(2026, 1, 2, 8, 0, tzinfo=tokyo)) == [date(2025, 12, 31), date(2026, 1, 1)]
