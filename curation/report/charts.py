"""Score histograms as SVG. The colours come from the page's style sheet."""

from __future__ import annotations

import math

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from curation.report.statistics import EDGES, LabelStatistics

WIDTH, HEIGHT, FOOT, HEAD = 640, 156, 22, 20
TICKS = (0.0001, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99)


def draw_histogram(label: LabelStatistics) -> Markup:
    """Draw a label's score histogram, on a logit axis whose ticks show scores. A bar's height is the root of its count.

    The root, because only one bar would be visible for a label that one image in a thousand has. Vertical lines show
    the threshold and the `accept` score. The colour of a bar shows whether its images are below the threshold, above
    the threshold, or accepted.
    """
    counts = label.histogram.astype(np.float64)
    tallest = math.sqrt(max(counts.max(), 1))
    step = WIDTH / len(counts)
    bars = []
    for index, count in enumerate(label.histogram.tolist()):
        if count:
            height = max(1.5, (HEIGHT - FOOT - HEAD) * math.sqrt(count) / tallest)
            x, y = index * step, HEIGHT - FOOT - height
            bars.append(
                f'<rect class="{_classify(label, index)}" x="{x + 0.75:.1f}" y="{y:.1f}" width="{step - 1.5:.1f}" '
                f'height="{height:.1f}"><title>{_describe_bin(index)}: {count:,} images</title></rect>'
            )
    ticks = "".join(
        f'<text x="{_x(score):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{score:g}</text>' for score in TICKS
    )
    lines = _line(label.threshold, "threshold") if label.threshold > 0 else ""
    if label.accept is not None:
        lines += _line(label.accept, "accept")
    described = f"Scores of {escape(label.label)}: {label.predicted:,} images reach {label.threshold:g}"
    return Markup(
        f'<svg class="histogram" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{described}">'
        f'<line class="axis" x1="0" x2="{WIDTH}" y1="{HEIGHT - FOOT}" y2="{HEIGHT - FOOT}"/>'
        f"{''.join(bars)}{lines}{ticks}</svg>"
    )


def _x(score: float) -> float:
    """The x coordinate of a score. Scores beyond the outermost edges are inside the first or the last bar."""
    step = WIDTH / (len(EDGES) + 1)
    width = EDGES[1] - EDGES[0]
    logit = math.log(min(max(score, 1e-9), 1 - 1e-9) / (1 - min(max(score, 1e-9), 1 - 1e-9)))
    return float(np.clip(step + (logit - EDGES[0]) / width * step, 0, WIDTH))


def _classify(label: LabelStatistics, index: int) -> str:
    """The CSS class of a bar, by where its middle is."""
    middle = (index + 0.5) * WIDTH / (len(EDGES) + 1)
    if label.accept is not None and middle >= _x(label.accept):
        return "accept"
    return "above" if middle >= _x(label.threshold) or label.threshold <= 0 else "below"


def _line(score: float, name: str) -> str:
    x, lower = _x(score), name == "accept"  # one line below the other, so that their texts do not overlap
    side, anchor = (-4, "end") if x > WIDTH * 0.8 else (4, "start")
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{HEAD if lower else 4}" y2="{HEIGHT - FOOT}"/>'
        f'<text class="mark" x="{x + side:.1f}" y="{2 * HEAD - 3 if lower else HEAD - 5}" text-anchor="{anchor}">'
        f"{name} {score:.3g}</text>"
    )


def _describe_bin(index: int) -> str:
    scores = 1 / (1 + np.exp(-EDGES))
    if index == 0:
        return f"under {scores[0]:.2g}"
    return f"over {scores[-1]:.4g}" if index == len(EDGES) else f"{scores[index - 1]:.2g} to {scores[index]:.2g}"


def draw_sparkline(histogram: NDArray[np.int64]) -> Markup:
    """Draw the histogram (bins,) as a small line for a row of a table."""
    counts = np.sqrt(histogram.astype(np.float64))
    tallest = max(counts.max(), 1.0)
    points = " ".join(f"{x * 2},{18 - 17 * count / tallest:.1f}" for x, count in enumerate(counts))
    return Markup(
        f'<svg class="spark" viewBox="0 0 {2 * (len(counts) - 1)} 18" preserveAspectRatio="none" aria-hidden="true">'
        f'<polyline points="{points}"/></svg>'
    )
