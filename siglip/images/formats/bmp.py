"""BMP: the variants that Pillow reads wrongly are read right, or named and rejected.

Offsets are those of Microsoft's BITMAPFILEHEADER, 14 bytes, and the header after it.
"""

from __future__ import annotations

from struct import unpack_from

from siglip.images.rejection import ImageRejected

_RGB, _RLE8, _RLE4, _BITFIELDS = range(4)
_COMPRESSIONS = {4: "JPEG or RLE24", 5: "PNG", 6: "alpha bit fields"}
_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_MASKS = {
    16: ((0xF800, 0x7E0, 0x1F), (0x7C00, 0x3E0, 0x1F)),
    24: ((0xFF0000, 0xFF00, 0xFF),),
}
"""By bits per pixel, the bit fields that Pillow reads. It checks those of 32 bits itself."""


def prepare_bmp(data: bytes) -> bytes:
    """Check a BMP before it is opened, and return it so that Pillow reads it right.

    Raises `ImageRejected` (`unsupported`) for a variant that Pillow does not read, or would read wrongly.
    """
    if len(data) < 26:
        raise ImageRejected("truncated", "the BMP ends in its header")
    start, size = unpack_from("<II", data, 10)
    if size not in _HEADERS:
        raise ImageRejected("unsupported", f"BMP with a header of {size} bytes")
    if len(data) < 14 + size:
        raise ImageRejected("truncated", "the BMP ends in its header")
    if size == 12:
        (bits,) = unpack_from("<H", data, 24)
        compression, colors = _RGB, 0
    else:
        bits, compression = unpack_from("<HI", data, 28)
        (colors,) = unpack_from("<I", data, 46)
    if compression not in (_RGB, _RLE8, _RLE4, _BITFIELDS):
        raise ImageRejected("unsupported", f"BMP with compression {_COMPRESSIONS.get(compression, compression)}")
    if bits not in (1, 4, 8, 16, 24, 32):
        raise ImageRejected("unsupported", f"BMP with {bits} bits per pixel")
    if size == 64 and compression == _BITFIELDS:
        raise ImageRejected("unsupported", "BMP of OS/2 in Huffman compression")
    if compression in (_RLE8, _RLE4) and bits != (8 if compression == _RLE8 else 4):
        raise ImageRejected("unsupported", f"BMP in run-length compression with {bits} bits per pixel")
    if compression in (_RLE8, _RLE4) and start % 2:  # Pillow aligns runs by their position in the file
        raise ImageRejected("unsupported", "BMP in run-length compression that starts at an odd byte")
    if compression == _BITFIELDS and bits in (16, 24):
        *masks, alpha = unpack_from("<4I", data.ljust(70), 54)
        if tuple(masks) not in _MASKS[bits] or (alpha and size >= 56):
            raise ImageRejected("unsupported", f"BMP with bit fields {masks[0]:x} {masks[1]:x} {masks[2]:x}")
    count = colors or 2**bits
    if size != 12 and bits in (4, 8) and count < 256 and _is_grey_ramp(data[14 + size :], count):
        # Pillow takes a palette of two colours, black and white, for an image of one bit per pixel, and one of 16 dark
        # greys for one of 8. With a count of one more colour it does not.
        data = data[:46] + (count + 1).to_bytes(4, "little") + data[50:]
    return data


def _is_grey_ramp(palette: bytes, count: int) -> bool:
    ramp = (0, 255) if count == 2 else range(count)
    return all(palette[4 * n : 4 * n + 3] == bytes([grey] * 3) for n, grey in enumerate(ramp))
