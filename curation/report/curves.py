"""Precision-recall curves as SVG, with their bands: by threshold, and precision against recall."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup, escape

from curation.report.charts import WIDTH, draw_level, draw_marks, draw_scores, place_score
from curation.report.statistics import LabelStatistics

_HEIGHT, _FOOT, _HEAD = 196, 22, 46
_SIDE, _MARGIN = 300, 34
"""The side of the chart of precision against recall, and its margin for numbers."""
Curve = Sequence[dict[str, Any]]
"""Points of `curation.estimates.curves.CurvePoint`, as they are in JSON: null is not known."""


def draw_thresholds(label: LabelStatistics, curve: Curve) -> Markup:
    """Draw precision and recall by threshold, on the axis of the label's histogram. Empty if nothing is known.

    Bands join the intervals of neighbouring thresholds. Where a figure is not known, its line has a gap.
    """
    drawn = "".join(_draw_figure(curve, name) for name in ("recall", "precision"))
    if not drawn:
        return Markup("")
    grid = "".join(draw_level(_y(level), f"{level:g}") for level in (0, 0.5, 1))
    described = f"Precision and recall of {escape(label.label)} by threshold"
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {_HEIGHT}" role="img" aria-label="{described}">{grid}{drawn}'
        f"{draw_scores(_HEIGHT, _FOOT)}{draw_marks(label, _HEIGHT - _FOOT)}</svg>"
    )


def draw_trade(label: LabelStatistics, curve: Curve) -> Markup:
    """Draw precision against recall, for the thresholds for which both are known. Empty if there are fewer than two.

    A box shows both intervals of a threshold.
    """
    known = [point for point in curve if _is_known(point, "precision") and _is_known(point, "recall")]
    if len(known) < 2:
        return Markup("")
    room = _SIDE - 2 * _MARGIN

    def place(recall: float, precision: float) -> tuple[float, float]:
        return _MARGIN + 8 + recall * room, _SIDE - _MARGIN - precision * room

    boxes = dots = ""
    for point in known:
        left, top = place(point["recall"]["low"], point["precision"]["high"])
        right, bottom = place(point["recall"]["high"], point["precision"]["low"])
        boxes += (
            f'<rect class="box" x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 1):.1f}" '
            f'height="{max(bottom - top, 1):.1f}"/>'
        )
        x, y = place(point["recall"]["value"], point["precision"]["value"])
        dots += f'<circle class="precision" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{_describe(point)}</title></circle>'
    line = " ".join(
        "{:.1f},{:.1f}".format(*place(point["recall"]["value"], point["precision"]["value"])) for point in known
    )
    ticks = ""
    for level in (0, 0.5, 1):
        x, y = place(level, level)
        first, last = place(0, 0)[0], place(1, 1)[0]
        ticks += (
            f'<line class="grid" x1="{first:.1f}" x2="{last:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{first - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{level:g}</text>'
            f'<text x="{x:.1f}" y="{_SIDE - _MARGIN + 15}" text-anchor="middle">{level:g}</text>'
        )
    described = f"Precision of {escape(label.label)} against recall"
    return Markup(
        f'<svg class="chart trade" viewBox="0 0 {_SIDE} {_SIDE}" role="img" aria-label="{described}">{ticks}{boxes}'
        f'<polyline class="precision" points="{line}"/>{dots}'
        f'<text x="{_SIDE / 2 + 8}" y="{_SIDE - 3}" text-anchor="middle">recall</text>'
        f'<text x="{_MARGIN - 24}" y="{_MARGIN - 14}">precision</text></svg>'
    )


def count_known(curve: Curve, figure: str) -> int:
    """The number of a curve's points at which the `figure`, precision or recall, is known."""
    return sum(_is_known(point, figure) for point in curve)


def _draw_figure(curve: Curve, name: str) -> str:
    """The line and the band of precision or recall. A point without neighbours has a bar in place of the band."""
    drawn = ""
    for known, group in groupby(curve, key=lambda point: _is_known(point, name)):
        if not known:
            continue
        points = list(group)
        xs = [place_score(point["threshold"]) for point in points]
        lows, values, highs = ([_y(point[name][bound]) for point in points] for bound in ("low", "value", "high"))
        if len(points) > 1:
            outline = [*zip(xs, highs, strict=True), *reversed(list(zip(xs, lows, strict=True)))]
            drawn += f'<polygon class="band {name}" points="{_join(outline)}"/>'
            drawn += f'<polyline class="{name}" points="{_join(zip(xs, values, strict=True))}"/>'
        else:
            drawn += f'<line class="{name}" x1="{xs[0]:.1f}" x2="{xs[0]:.1f}" y1="{lows[0]:.1f}" y2="{highs[0]:.1f}"/>'
        for x, y, point in zip(xs, values, points, strict=True):
            drawn += (
                f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>{_describe(point)}</title></circle>'
            )
    return drawn


def _is_known(point: dict[str, Any], figure: str) -> bool:
    return all(point[figure][bound] is not None for bound in ("low", "value", "high"))


def _y(share: float) -> float:
    return _HEIGHT - _FOOT - share * (_HEIGHT - _FOOT - _HEAD)


def _join(points: Any) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _describe(point: dict[str, Any]) -> str:
    figures = [
        f"{name} {point[name]['value']:.2f} ({point[name]['low']:.2f} to {point[name]['high']:.2f})"
        for name in ("precision", "recall")
        if _is_known(point, name)
    ]
    told = ", ".join(figures)
    return f"from {point['threshold']:.3g}: {point['images']:,} images, {point['answers']:,} answers, {told}"
