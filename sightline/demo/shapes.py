"""Rendered images of coloured shapes: the shipped checkpoint is trained on them, and the demo tags them."""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 150, 50),
    "blue": (30, 60, 220),
    "yellow": (240, 220, 30),
    "purple": (130, 30, 160),
    "orange": (250, 135, 15),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "stripe")
LABELS = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
"""The 64 labels that the shipped checkpoint tells apart: each colour with each shape."""

_SUPERSAMPLING = 3
"""A shape is drawn this many times larger on each side and then reduced, for smooth edges."""


def render(label: str, rng: random.Random, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Draw the label's shape on a grey background: an RGB image of `size` (width, height) pixels.

    Position, scale, rotation, shade and background are random numbers from `rng`, so the same state of `rng` gives the
    same image. The shape is stretched to the image's sides, as SigLIP's preprocessing stretches an image. Raises
    `ValueError` for a label that is not in `LABELS`.
    """
    color, _, shape = label.partition(" ")
    if color not in COLORS or shape not in SHAPES:
        raise ValueError(f"{label!r} is not one of the rendered labels")
    width, height = (side * _SUPERSAMPLING for side in size)
    grey = rng.randint(95, 190)
    image = Image.new("RGB", (width, height), (grey, grey, grey))
    draw = ImageDraw.Draw(image)
    fill = tuple(max(0, min(255, c + rng.randint(-18, 18))) for c in COLORS[color])
    radius = rng.uniform(0.24, 0.42)
    x, y = (rng.uniform(radius + 0.02, 0.98 - radius) for _ in range(2))
    angle = rng.uniform(-0.3, 0.3)

    def place(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """Map points of the shape's square [-1, 1] x [-1, 1] to pixels."""
        cos, sin = math.cos(angle), math.sin(angle)
        return [
            (width * (x + radius * (cos * px - sin * py)), height * (y + radius * (sin * px + cos * py)))
            for px, py in points
        ]

    for polygon in _outline(shape):
        draw.polygon(place(polygon), fill=fill)
    if shape == "ring":
        draw.polygon(place(_regular(48, 0.55)), fill=(grey, grey, grey))
    return image.resize(size, Image.Resampling.BOX)


def _regular(corners: int, radius: float = 1.0, turn: float = 0.0) -> list[tuple[float, float]]:
    """Return the corners of a regular polygon around (0, 0), turned by `turn` radians."""
    steps = [2 * math.pi * i / corners + turn for i in range(corners)]
    return [(radius * math.cos(t), radius * math.sin(t)) for t in steps]


def _outline(shape: str) -> list[list[tuple[float, float]]]:
    """Return the shape's polygons in [-1, 1] x [-1, 1]; y points down."""
    if shape in ("circle", "ring"):
        return [_regular(48)]
    if shape == "square":
        return [[(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]]
    if shape == "triangle":
        return [[(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)]]
    if shape == "star":
        outer, inner = _regular(5, 1.0, -math.pi / 2), _regular(5, 0.4, -math.pi / 2 + math.pi / 5)
        return [[point for pair in zip(outer, inner, strict=True) for point in pair]]
    if shape == "cross":
        bar = [(-1.0, -0.3), (1.0, -0.3), (1.0, 0.3), (-1.0, 0.3)]
        return [bar, [(py, px) for px, py in bar]]
    if shape == "heart":
        steps = [2 * math.pi * i / 48 for i in range(48)]
        curve = [
            (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
            for t in steps
        ]
        return [curve]
    return [[(-1.0, -0.28), (1.0, -0.28), (1.0, 0.28), (-1.0, 0.28)]]
