"""Draw `docs/tagged.png`: a row of images from an output, each with the labels and scores that the job wrote.

    python scripts/draw_tagged.py demo/output docs/tagged.png

The output must have thumbnails, as that of `sightline demo` has. The images of the demo are rendered by
`sightline/demo/shapes.py`, so the picture is free of other people's rights.
"""

from __future__ import annotations

import io
import sys

import pyarrow.dataset as ds
from PIL import Image, ImageDraw, ImageFont

IMAGES, SIDE, TEXT_HEIGHT, MARGIN = 6, 176, 52, 12


def draw_row(output: str, path: str) -> None:
    """Write a PNG of `IMAGES` images side by side, chosen evenly over the rows of `output`."""
    table = ds.dataset(f"{output}/data").to_table(columns=["key", "labels", "scores", "thumbnail"])
    rows = [row for row in table.sort_by("key").to_pylist() if row["labels"]]
    step = max(1, len(rows) // IMAGES)
    width = IMAGES * (SIDE + MARGIN) + MARGIN
    canvas = Image.new("RGB", (width, SIDE + TEXT_HEIGHT + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(15)
    for place, row in enumerate(rows[step // 2 :: step][:IMAGES]):
        left = MARGIN + place * (SIDE + MARGIN)
        picture = Image.open(io.BytesIO(row["thumbnail"])).convert("RGB")
        picture.thumbnail((SIDE, SIDE))
        canvas.paste(picture, (left + (SIDE - picture.width) // 2, MARGIN + (SIDE - picture.height) // 2))
        label, score = row["labels"][0], row["scores"][0]
        draw.text((left, SIDE + MARGIN + 8), f"{label}", fill="black", font=font)
        draw.text((left, SIDE + MARGIN + 28), f"{score:.2f}", fill="#666666", font=font)
    canvas.save(path, optimize=True)


if __name__ == "__main__":
    draw_row(*sys.argv[1:])
