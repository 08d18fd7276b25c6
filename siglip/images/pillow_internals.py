"""Workarounds for Pillow that rely on more than its documented interface.

`tests/quick/siglip/test_internals.py` fails with a clear message when a version of Pillow no longer works this way.
"""

from __future__ import annotations

from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile


def set_orientation(image: TiffImageFile, orientation: int) -> None:
    """Have Pillow turn a TIFF by this EXIF orientation (1 to 8) when it loads the image, and read no other EXIF.

    `TiffImageFile.load` calls `self.getexif()` to find the orientation, which parses the whole EXIF block and raises
    errors of many types on a broken one. The method of this one object is therefore replaced by one that returns a
    block with a single tag. There is no public way to turn this off.
    """
    exif = Image.Exif()
    if orientation != 1:
        exif[ExifTags.Base.Orientation] = orientation
    image.getexif = lambda: exif  # type: ignore[method-assign]


def hide_exif(data: bytes) -> bytes | None:
    """An AVIF or HEIF file without its EXIF item, or None for a file that has none.

    The plugins for these formats parse EXIF when they open a file, and a broken block makes them reject the image.
    Neither has an option against that. Here the item's type in the file's index, before the `mdat` box with the image
    data, is renamed, so that the plugins do not find it. The pixels stay the same: in these formats a property of the
    image says how it is turned, and not its EXIF.
    """
    head, box, rest = data.partition(b"mdat")
    if b"infe" not in head or b"Exif" not in head:
        return None
    return head.replace(b"Exif", b"exi_") + box + rest
