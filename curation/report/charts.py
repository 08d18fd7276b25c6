"""Charts of a label's scores as SVG: the histogram, and its small form for a table. Colours are in the style sheet."""

from __future__ import annotations

import math

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from curation.report.statistics import EDGES, LabelStatistics

WIDTH, LEFT = 640, 40
"""The width of a chart over scores, and of the margin for the numbers of its vertical axis."""
TICKS = (0.0001, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99)
_HEIGHT, _FOOT, _HEAD = 196, 22, 42
_STEP = (WIDTH - LEFT) / (len(EDGES) + 1)


def draw_histogram(label: LabelStatistics) -> Markup:
    """Draw a label's score histogram: scores on a logit axis, and numbers of images on a logarithmic axis.

    Logarithmic, because only one bar would be visible for a label that one image in a thousand has. The vertical axis
    starts at 0 images: a bar's height is log(1 + count). Vertical lines show the threshold and the `accept` score. The
    colour of a bar shows whether its images are below the threshold, above the threshold, or accepted.
    """
    most = int(max(label.histogram.max(), 1))
    room = _HEIGHT - _FOOT - _HEAD
    bars = []
    for index, count in enumerate(label.histogram.tolist()):
        if count:
            height = room * math.log1p(count) / math.log1p(most)
            x, y = LEFT + index * _STEP, _HEIGHT - _FOOT - height
            bars.append(
                f'<rect class="{_classify(label, index)}" x="{x + 0.75:.1f}" y="{y:.1f}" width="{_STEP - 1.5:.1f}" '
                f'height="{height:.1f}"><title>{_describe_bin(index)}: {count:,} images</title></rect>'
            )
    grid = "".join(
        draw_level(_HEIGHT - _FOOT - room * math.log1p(count) / math.log1p(most), _shorten(count))
        for count in list_counts(most)
    )
    described = f"Scores of {escape(label.label)}: {label.predicted:,} images reach {label.threshold:g}"
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {_HEIGHT}" role="img" aria-label="{described}">{grid}{"".join(bars)}'
        f"{draw_scores(_HEIGHT, _FOOT)}{draw_marks(label, _HEIGHT - _FOOT)}</svg>"
    )


def draw_scores(height: int, foot: int) -> str:
    """The horizontal axis of a chart over scores, with its ticks in the lowest `foot` of its `height`."""
    ticks = "".join(
        f'<text x="{place_score(score):.1f}" y="{height - 6}" text-anchor="middle">{score:g}</text>' for score in TICKS
    )
    return f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{height - foot}" y2="{height - foot}"/>{ticks}'


def draw_level(y: float, name: str) -> str:
    """A horizontal line of the grid with its number."""
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{name}</text>'
    )


def draw_marks(label: LabelStatistics, bottom: int) -> str:
    """The vertical lines of a label's threshold and `accept` score, down to `bottom`."""
    marks = [(label.threshold, "threshold")] if label.threshold > 0 else []
    if label.accept is not None:
        both = marks and math.isclose(label.accept, label.threshold)
        marks = [(label.accept, "threshold and accept")] if both else [*marks, (label.accept, "accept")]
    lines = ""
    for row, (score, name) in enumerate(marks):
        x = place_score(score)
        side, anchor = (-4, "end") if x > WIDTH * 0.7 else (4, "start")
        lines += (
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{2 + row * 18}" y2="{bottom}"/>'
            f'<text class="mark" x="{x + side:.1f}" y="{13 + row * 18}" text-anchor="{anchor}">'
            f"{name} {score:.3g}</text>"
        )
    return lines


def place_score(score: float) -> float:
    """The x coordinate of a score. Scores beyond the outermost edges are inside the first or the last bar."""
    inside = min(max(score, 1e-9), 1 - 1e-9)
    logit = math.log(inside / (1 - inside))
    return float(np.clip(LEFT + _STEP + (logit - EDGES[0]) / (EDGES[1] - EDGES[0]) * _STEP, LEFT, WIDTH))


def list_counts(most: int) -> list[int]:
    """The numbers at the ticks of a logarithmic axis up to `most`: powers of ten, at most six of them, and `most`."""
    powers = [10**power for power in range(len(str(most)))]
    ticks = powers[:: 1 + (len(powers) - 1) // 6]
    if most > 4 * ticks[-1]:
        return [*ticks, most]
    return [*ticks[:-1], most] if most > 1 else ticks


def draw_sparkline(histogram: NDArray[np.int64]) -> Markup:
    """Draw the histogram (bins,) as a small line for a row of a table, with the axes of `draw_histogram`."""
    counts = np.log1p(histogram.astype(np.float64))
    tallest = max(counts.max(), 1.0)
    points = " ".join(f"{x * 2},{18 - 17 * count / tallest:.1f}" for x, count in enumerate(counts))
    return Markup(
        f'<svg class="spark" viewBox="0 0 {2 * (len(counts) - 1)} 18" preserveAspectRatio="none" aria-hidden="true">'
        f'<polyline points="{points}"/></svg>'
    )


def _classify(label: LabelStatistics, index: int) -> str:
    """The CSS class of a bar, by where its middle is."""
    middle = LEFT + (index + 0.5) * _STEP
    if label.accept is not None and middle >= place_score(label.accept):
        return "accept"
    return "above" if middle >= place_score(label.threshold) or label.threshold <= 0 else "below"


def _describe_bin(index: int) -> str:
    scores = 1 / (1 + np.exp(-EDGES))
    if index == 0:
        return f"under {scores[0]:.2g}"
    return f"over {scores[-1]:.4g}" if index == len(EDGES) else f"{scores[index - 1]:.2g} to {scores[index]:.2g}"


def _shorten(count: int) -> str:
    """A count in at most five characters: 950, 1.2k, 38k, 5M."""
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if count >= size:
            return f"{count / size:.2g}{unit}" if count < 100 * size else f"{count // size}{unit}"
    return str(count)
