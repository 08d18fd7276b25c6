"""Embeddings beside those of transformers, for the shape of each published checkpoint: the table of siglip/README.md.

    python -m benchmarks.parity

Each checkpoint is a small one with random weights: see `tests/support/published.py`. The reference is transformers'
SiglipModel in float32. A figure is the lowest cosine of two images and fifteen texts, over the sizes in a row. It takes
a few minutes.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.checkpoints import make_siglip, make_siglip2
from tests.support.parity import embed_here, embed_there, load, lowest_cosine
from tests.support.published import ROWS, Published, make_published


def measure(row: Published, folder: Path, tokenizer: Path) -> tuple[float, float]:
    """The lowest cosine in float32 and in bfloat16."""
    directory = make_published(row, folder / row.name.replace("/", "-"), tokenizer)
    theirs = embed_there(directory, row.length)
    float32, bfloat16 = (lowest_cosine(embed_here(load(directory, dtype)), theirs) for dtype in ("float32", "bfloat16"))
    return float32, bfloat16


def main() -> None:
    """Print the table as Markdown."""
    found: dict[tuple[str, str, int], list[tuple[int, float, float]]] = defaultdict(list)
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokenizers = {"siglip": make_siglip(folder / "siglip"), "siglip2": make_siglip2(folder / "siglip2")}
        for row in ROWS:
            found[row.family, row.tower, row.patch].append((row.image, *measure(row, folder, tokenizers[row.family])))
    print("| shape | pixels | float32 | bfloat16 |\n|---|---|---|---|")
    for (family, tower, patch), rows in found.items():
        sizes = ", ".join(str(size) for size in sorted({size for size, _, _ in rows}))
        float32, bfloat16 = (min(row[column] for row in rows) for column in (1, 2))
        print(f"| {family} {tower}, patches of {patch} | {sizes} | {float32:.7f} | {bfloat16:.5f} |")


if __name__ == "__main__":
    main()
