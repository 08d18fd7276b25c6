"""A short run of `benchmarks.calibration`: intervals cover, promises are kept, forecasts come true."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from benchmarks import calibration
from benchmarks.truths import make_binormal

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calibration.TRUTHS, "small", lambda: make_binormal(30_000))


def simulate(purpose: str, answers: int, wrong: float, repetitions: int) -> dict[str, list[float]]:
    observed = defaultdict(list)
    case = calibration.Case("small", purpose, answers, wrong, purpose == "two rounds")
    for seed in range(repetitions):
        for name, value in calibration.repeat(case, seed):
            observed[name].append(value)
    return observed


@pytest.mark.parametrize(("purpose", "answers"), [("precision", 100), ("evaluation", 300)])
@pytest.mark.parametrize("wrong", [0.0, 0.02])
def test_printed_intervals_cover_the_truth(purpose: str, answers: int, wrong: float) -> None:
    observed = simulate(purpose, answers, wrong, 10)
    covered = [value for name, values in observed.items() if name.startswith("covered") for value in values]
    assert len(covered) > 80
    assert np.mean(covered) >= 0.95
    assert np.mean(observed["covered precision"]) >= 0.93
    assert np.mean(observed["printed precision"]) > 0.9
    if purpose == "evaluation":
        assert observed["covered recall"]
        assert np.mean(observed["covered recall"]) >= 0.93
    else:
        assert np.mean(observed["kept"]) >= 0.95


def test_a_second_round_reaches_the_target_and_the_forecast_comes_true() -> None:
    observed = simulate("two rounds", 100, 0.0, 4)
    reached = [value for name, values in observed.items() if name.startswith("reached") for value in values]
    assert np.mean(reached) > 0.7
    assert np.mean(observed["kept"]) >= 0.9
    assert 1 / 1.5 <= np.median(observed["needed / forecast"]) <= 1.5
