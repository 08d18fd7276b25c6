"""A histogram as an SVG, in the page's own colours."""

from __future__ import annotations

import math

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from curation.report.statistics import EDGES, LabelStatistics

WIDTH, HEIGHT, FOOT, HEAD = 640, 156, 22, 20
TICKS = (0.0001, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99)


def draw_histogram(label: LabelStatistics) -> Markup:
    """Images by score, on a logit axis with the scores written under it; bars by the root of their count.

    The root, because a label that is right for one image in a thousand would otherwise show one bar. The threshold and
    the score from which it is sure are lines, and the bars right of them are coloured as what they mean.
    """
    counts = label.histogram.astype(np.float64)
    tallest = math.sqrt(max(counts.max(), 1))
    step = WIDTH / len(counts)
    bars = []
    for place, count in enumerate(label.histogram.tolist()):
        if count:
            height = max(1.5, (HEIGHT - FOOT - HEAD) * math.sqrt(count) / tallest)
            x, y = place * step, HEIGHT - FOOT - height
            bars.append(
                f'<rect class="{_band(label, place)}" x="{x + 0.75:.1f}" y="{y:.1f}" width="{step - 1.5:.1f}" '
                f'height="{height:.1f}"><title>{_range(place)}: {count:,} images</title></rect>'
            )
    ticks = "".join(
        f'<text x="{_x(score):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{score:g}</text>' for score in TICKS
    )
    lines = _line(label.threshold, "threshold") if label.threshold > 0 else ""
    if label.accept is not None:
        lines += _line(label.accept, "sure")
    described = f"Scores of {escape(label.label)}: {label.given:,} images reach {label.threshold:g}"
    return Markup(
        f'<svg class="histogram" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{described}">'
        f'<line class="axis" x1="0" x2="{WIDTH}" y1="{HEIGHT - FOOT}" y2="{HEIGHT - FOOT}"/>'
        f"{''.join(bars)}{lines}{ticks}</svg>"
    )


def _x(score: float) -> float:
    """Where a score stands; the outer bars hold all that is beyond the edges."""
    step = WIDTH / (len(EDGES) + 1)
    width = EDGES[1] - EDGES[0]
    logit = math.log(min(max(score, 1e-9), 1 - 1e-9) / (1 - min(max(score, 1e-9), 1 - 1e-9)))
    return float(np.clip(step + (logit - EDGES[0]) / width * step, 0, WIDTH))


def _band(label: LabelStatistics, place: int) -> str:
    middle = (place + 0.5) * WIDTH / (len(EDGES) + 1)
    if label.accept is not None and middle >= _x(label.accept):
        return "accept"
    return "given" if middle >= _x(label.threshold) or label.threshold <= 0 else "below"


def _line(score: float, name: str) -> str:
    x, sure = _x(score), name == "sure"
    side, anchor = (-4, "end") if x > WIDTH * 0.8 else (4, "start")
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{HEAD if sure else 4}" y2="{HEIGHT - FOOT}"/>'
        f'<text class="mark" x="{x + side:.1f}" y="{2 * HEAD - 3 if sure else HEAD - 5}" text-anchor="{anchor}">'
        f"{name} {score:.3g}</text>"
    )


def _range(place: int) -> str:
    scores = 1 / (1 + np.exp(-EDGES))
    if place == 0:
        return f"under {scores[0]:.2g}"
    return f"over {scores[-1]:.4g}" if place == len(EDGES) else f"{scores[place - 1]:.2g} to {scores[place]:.2g}"


def draw_spark(histogram: NDArray[np.int64]) -> Markup:
    """The same in a table's row."""
    counts = np.sqrt(histogram.astype(np.float64))
    tallest = max(counts.max(), 1.0)
    points = " ".join(f"{x * 2},{18 - 17 * count / tallest:.1f}" for x, count in enumerate(counts))
    return Markup(
        f'<svg class="spark" viewBox="0 0 {2 * (len(counts) - 1)} 18" preserveAspectRatio="none" aria-hidden="true">'
        f'<polyline points="{points}"/></svg>'
    )
