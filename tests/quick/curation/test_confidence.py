"""Confidence bounds: exact in one cell, melded over several, and honest about wrong answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta, binom, hypergeom

from curation.estimates.confidence import (
    Cells,
    Melding,
    bound_precision,
    bound_share_above,
    bound_share_below,
    estimate_share,
    reaches,
    target_of_answers,
)


def make(*cells: tuple[int, int, int, int]) -> Cells:
    return Cells(*(np.asarray(column) for column in zip(*cells, strict=True)))


def test_the_bounds_of_a_large_population_are_those_of_clopper_and_pearson() -> None:
    for drawn, right in ((100, 97), (30, 30), (50, 1), (7, 3)):
        low, high = (bound(10**7, drawn, right, 0.0, 0.025) for bound in (bound_share_below, bound_share_above))
        assert low == pytest.approx(beta.ppf(0.025, right, drawn - right + 1), abs=1e-5)
        assert high == pytest.approx(1.0 if right == drawn else beta.ppf(0.975, right + 1, drawn - right), abs=1e-5)


def test_the_bounds_of_a_small_population_cover_exactly() -> None:
    """For each number of right images, the chance that a bound fails is at most alpha: all samples are counted."""
    for size, drawn in ((12, 5), (40, 20), (9, 9)):
        bounds = [
            (bound_share_below(size, drawn, x, 0, 0.05), bound_share_above(size, drawn, x, 0, 0.05))
            for x in range(drawn + 1)
        ]
        for right in range(size + 1):
            chance = hypergeom.pmf(np.arange(drawn + 1), size, right, drawn)
            for side in range(2):
                fails = [(low > right / size + 1e-9, high < right / size - 1e-9)[side] for low, high in bounds]
                assert chance[np.asarray(fails)].sum() <= 0.05 + 1e-9


def test_what_was_looked_at_is_known() -> None:
    whole = estimate_share(make((50, 50, 48, 0)), wrong_answers=0)
    assert (whole.value, whole.low, whole.high) == pytest.approx((0.96, 0.96, 0.96))
    allowed = estimate_share(make((50, 50, 48, 0)), wrong_answers=0.02)
    assert allowed.low == pytest.approx((48 - binom.ppf(0.975, 50, 0.02)) / 50)
    assert allowed.high == 1.0


def test_the_intervals_of_small_populations_cover_with_wrong_answers() -> None:
    """All images are looked at, and the answers are wrong by chance: the exact share is unknown then too."""
    random = np.random.default_rng(5)
    for size, right in ((26, 13), (60, 54), (200, 190)):
        said = right - random.binomial(right, 0.02, 400) + random.binomial(size - right, 0.02, 400)
        found = [estimate_share(make((size, size, int(count), 0))) for count in said]
        assert np.mean([one.low <= right / size <= one.high for one in found]) >= 0.94


def test_unsure_answers_widen_the_interval_on_both_sides() -> None:
    sure, unsure = estimate_share(make((1000, 50, 40, 0))), estimate_share(make((1000, 60, 40, 10)))
    assert unsure.value == sure.value
    assert unsure.low < sure.low
    assert unsure.high > sure.high


def test_a_share_is_not_known_without_enough_answers() -> None:
    assert not estimate_share(make((1000, 3, 3, 0))).known
    assert not estimate_share(make((1000, 50, 40, 0), (5000, 0, 0, 0))).known
    assert not estimate_share(make((1000, 2, 0, 2))).known
    assert str(estimate_share(make((1000, 3, 3, 0)))) == "-"


def test_melding_one_cell_gives_its_exact_bounds() -> None:
    low, high = Melding(0.0, draws=200_000).draw_right(make((300, 60, 51, 0)))
    assert np.quantile(low, 0.05) / 300 == pytest.approx(bound_share_below(300, 60, 51, 0, 0.05), abs=0.004)
    assert np.quantile(high, 0.95) / 300 == pytest.approx(bound_share_above(300, 60, 51, 0, 0.05), abs=0.004)


@pytest.mark.parametrize("wrong", [0.0, 0.02])
def test_melded_intervals_cover(wrong: float) -> None:
    random = np.random.default_rng(1)
    sizes, shares, drawn = (800, 4000, 60_000), (0.95, 0.4, 0.002), (40, 30, 60)
    covered = []
    for _ in range(300):
        right = [int(random.binomial(size, share)) for size, share in zip(sizes, shares, strict=True)]
        seen = [random.hypergeometric(r, size - r, n) for r, size, n in zip(right, sizes, drawn, strict=True)]
        said = [x - random.binomial(x, wrong) + random.binomial(n - x, wrong) for x, n in zip(seen, drawn, strict=True)]
        cells = make(*((size, n, int(x), 0) for size, n, x in zip(sizes, drawn, said, strict=True)))
        found = estimate_share(cells, wrong_answers=0.02)
        covered.append(found.low <= sum(right) / sum(sizes) <= found.high)
    assert np.mean(covered) >= 0.93


def test_the_cheap_test_agrees_with_the_bound() -> None:
    random = np.random.default_rng(2)
    for _ in range(300):
        size = int(random.integers(1, 3000))
        drawn = int(random.integers(1, size + 1))
        right = int(random.integers(0, drawn + 1))
        share = float(random.uniform(0.3, 0.99))
        wrong = float(random.choice([0, 0.02]))
        bound = bound_share_below(size, drawn, right, wrong, 0.05)
        if abs(bound - share) > 1e-9:
            sizes, drawns, rights = (np.asarray([one]) for one in (size, drawn, right))
            assert reaches(sizes, drawns, rights, target_of_answers(share, wrong), 0.05)[0] == (bound >= share)


def test_a_bound_over_several_cells_is_not_above_the_share() -> None:
    cells = make((100, 50, 50, 0), (300, 60, 54, 0))
    assert 0.8 < bound_precision(cells, 0.0, 0.05) < (100 + 270) / 400
    empty = Cells(*(np.zeros(0, np.int64) for _ in range(4)))
    assert bound_precision(empty, 0.0, 0.05) == 0
