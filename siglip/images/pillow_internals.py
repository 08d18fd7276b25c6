"""Workarounds for Pillow that rely on more than its documented interface.

`tests/quick/siglip/test_internals.py` fails with a clear message when a version of Pillow no longer works this way.
"""

from __future__ import annotations

import io

from PIL import ExifTags, Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile


def open_format(data: bytes, format: str) -> Image.Image:
    """Open an image in one format, without Pillow's limit on pixels, which belongs to the whole process.

    `Image.open` calls the function that a plugin has registered, and then compares `Image.MAX_IMAGE_PIXELS`. Here the
    function is called directly. Raises what plugins raise: SyntaxError, IndexError, TypeError, struct.error and others.
    """
    if format not in Image.OPEN:
        Image.init()
    return Image.OPEN[format][0](io.BytesIO(data), "")


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


def use_libtiff(image: TiffImageFile, rawmode: str) -> None:
    """Have Pillow load an uncompressed TIFF with libtiff, and not with its own code for uncompressed data.

    Pillow decides that by a setting of the whole process, `TiffImagePlugin.READ_LIBTIFF`. Here the decision of one
    object is replaced, before it is loaded. `rawmode` is Pillow's name for the layout of the samples.
    """
    image.use_load_libtiff = True
    extents = (0, 0, image.tag_v2[256], image.tag_v2[257])
    image.tile = [ImageFile._Tile("libtiff", extents, 0, (rawmode, False, image.tag_v2.offset))]


def read_low_bytes(png: bytes) -> Image.Image:
    """The low bytes of the samples of a PNG in 16-bit RGB, as an image in RGB. Pillow itself gives the high bytes.

    Pillow has no mode for such samples. It is told that they are little-endian, and so takes the other byte.
    """
    image = Image.open(io.BytesIO(png), formats=("PNG",))
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
    return image
