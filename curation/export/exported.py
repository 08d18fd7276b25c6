"""What an export did: its counts, and what a user should know."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Exported:
    """What an export did. Every row of the output is counted once: in `images`, or in one of `without_...`."""

    destination: str
    images: int
    """The number of images that were exported."""
    without_keep: int
    """The number of images that were not in the list `keep`."""
    without_where: int
    """The number of images of the list, or of the output, for which the condition did not hold."""
    without_file: int
    """The number of images that were left out because they have no file. `missing` names the first of them."""
    rejected: int
    """The number of rejected rows of the output, none of which is exported."""
    missing: tuple[str, ...]
    notices: tuple[str, ...]

    def __str__(self) -> str:
        left_out = [
            f"{count:,} {why}"
            for count, why in (
                (self.without_keep, "by --keep"),
                (self.without_where, "by --where"),
                (self.without_file, "without a file"),
            )
            if count
        ]
        text = f"{self.images:,} images are in {self.destination}"
        if left_out:
            text += f"; left out: {', '.join(left_out)}"
        return text + (f"; {self.rejected:,} rejected rows are not exported" if self.rejected else "")
