"""BMP: the variants that Pillow reads wrongly are read right, or named and rejected.

Offsets are those of Microsoft's BITMAPFILEHEADER, 14 bytes, and the header after it.
"""

from __future__ import annotations

from struct import pack, unpack_from

from siglip.images.rejection import ImageRejected

_RGB, _RLE8, _RLE4, _BITFIELDS = range(4)
_COMPRESSIONS = {4: "JPEG or RLE24", 5: "PNG", 6: "alpha bit fields"}
_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_MASKS = {
    16: ((0xF800, 0x7E0, 0x1F), (0x7C00, 0x3E0, 0x1F)),
    24: ((0xFF0000, 0xFF00, 0xFF),),
}
"""By bits per pixel, the bit fields that Pillow reads. It checks those of 32 bits itself."""


def prepare_bmp(data: bytes, max_pixels: int) -> bytes:
    """Check a BMP before it is opened, and return it so that Pillow reads it right.

    One in run-length compression is returned uncompressed, unless it has more than `max_pixels`. Raises
    `ImageRejected`: `unsupported` for a variant that Pillow does not read or would read wrongly, and `truncated`.
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
    if compression == _BITFIELDS and bits in (16, 24):
        *masks, alpha = unpack_from("<4I", data.ljust(70), 54)
        if tuple(masks) not in _MASKS[bits] or (alpha and size >= 56):
            raise ImageRejected("unsupported", f"BMP with bit fields {masks[0]:x} {masks[1]:x} {masks[2]:x}")
    if compression in (_RLE8, _RLE4):
        width, height = unpack_from("<ii", data, 18)
        if width <= 0 or height == 0 or width * abs(height) > max_pixels:
            return data
        palette = (
            data[14 + size : start] if start > 14 + size else data[14 + size : 14 + size + 4 * (colors or 2**bits)]
        )
        pixels = _expand_runs(data, max(start, 14 + size), width, abs(height), compression == _RLE4)
        header = pack("<IiiHHIIiiII", 40, width, height, 1, 8, _RGB, 0, 0, 0, 256, 0)
        start = 14 + 40 + 1024
        return (
            pack("<2sIII", b"BM", start + len(pixels), 0, start) + header + palette[:1024].ljust(1024, b"\0") + pixels
        )
    if size == 12 and bits == 4 and (start - 26) // 3 >= 16:
        # Pillow takes 16 dark greys for an image of 8 bits. It gets this one with the header of Windows.
        palette = b"".join(data[at : at + 3] + b"\0" for at in range(26, 26 + 48, 3))
        width, height = unpack_from("<HH", data, 18)
        header = pack("<IiiHHIIiiII", 40, width, height, 1, 4, _RGB, 0, 0, 0, 16, 0)
        moved = 14 + 40 + 64
        head = pack("<2sIII", b"BM", moved + len(data) - start, 0, moved)
        return prepare_bmp(head + header + palette + data[start:], max_pixels)
    count = colors or 2**bits
    if size != 12 and bits in (4, 8) and count < 256 and _is_grey_ramp(data[14 + size :], count):
        # Pillow takes a palette of two colours, black and white, for an image of one bit per pixel, and one of 16 dark
        # greys for one of 8. With a count of one more colour it does not.
        data = data[:46] + (count + 1).to_bytes(4, "little") + data[50:]
    return data


def _expand_runs(data: bytes, position: int, width: int, height: int, four_bits: bool) -> bytes:
    """Expand runs to one byte per pixel, rows of a multiple of four. What no run covers has colour 0.

    Pillow does not count rows without a run, and aligns runs by their position in the file.
    """
    stride = -(-width // 4) * 4
    out = bytearray(stride * height)
    start, x, y = position, 0, 0
    while position + 2 <= len(data) and y < height:
        count, value = data[position], data[position + 1]
        position += 2
        if count:
            run = bytes((value >> 4, value & 15)) * (count // 2 + 1) if four_bits else bytes((value,)) * count
        elif value == 0:
            x, y = 0, y + 1
            continue
        elif value == 1:
            return bytes(out)
        elif value == 2:
            x, y = x + data[position], y + data[position + 1]
            position += 2
            continue
        else:
            count, size = value, (value + 1) // 2 if four_bits else value
            run = data[position : position + size]
            if len(run) < size:
                break
            if four_bits:
                run = bytes(nibble for byte in run for nibble in (byte >> 4, byte & 15))
            position += size + (position + size - start) % 2
        count = min(count, width - x)
        if count > 0:
            out[y * stride + x : y * stride + x + count] = run[:count]
        x += count
    if y < height - 1 or (y == height - 1 and x < width):
        raise ImageRejected("truncated", "the BMP's runs end before its last pixel")
    return bytes(out)


def _is_grey_ramp(palette: bytes, count: int) -> bool:
    ramp = (0, 255) if count == 2 else range(count)
    return all(palette[4 * n : 4 * n + 3] == bytes([grey] * 3) for n, grey in enumerate(ramp))
