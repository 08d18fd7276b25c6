"""JPEG: its header, decoding with libjpeg directly, files without an end marker, and blocks that Pillow stumbles on.

Markers are those of ITU-T T.81, table B.1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from siglip.images.rejection import ImageRejected

Pixels = NDArray[np.uint8]

_HUFFMAN_DCT = (0xC0, 0xC1, 0xC2)
"""Baseline, extended and progressive: the processes of nearly all files."""
_OTHERS = (0xC3, 0xC9, 0xCA)
"""Lossless, arithmetic, arithmetic progressive: processes that Pillow decodes, without shrinking."""
_UNSUPPORTED = {
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF, 0xDE), "hierarchical JPEG"),
    0xCB: "lossless arithmetic JPEG",
    0xF7: "JPEG-LS",
}
_PROGRESSIVE = (0xC2, 0xCA)
_EOI, _SOS = 0xD9, 0xDA
_BARE = (0x01, *range(0xD0, 0xD9))
"""Markers without a length and a segment: TEM, RST0 to RST7, SOI."""
_END = b"\xff\xd9"
_MARKER = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)
_SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_KEPT = {b"JFIF\0": 0xE0, b"Exif\0\0": 0xE1, b"http://ns.adobe.com/xap/1.0/\0": 0xE1, b"Adobe": 0xEE}
"""Application segments with a meaning for pixels or for the orientation, by their first bytes."""
_MOST_SEGMENTS = 10_000
"""Most segments before the pixels. A colour profile of 16 MB has 255; Pillow keeps each one in memory."""
_BLOCK_ROWS = 16
"""Most rows of pixels in a row of blocks (MCUs) of the usual subsamplings."""


@dataclass
class JpegHeader:
    """The frame of a JPEG, and where its first scan is.

    `process` is the frame's marker. `segments` are those before the scan: marker, start and end. `scan` is the position
    of the first scan's marker.
    """

    process: int = 0
    precision: int = 0
    width: int = 0
    height: int = 0
    components: tuple[int, ...] = ()
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    scan: int = 0

    @property
    def shrinkable(self) -> bool:
        """Whether libjpeg shrinks this image when it is asked to. It ignores that for lossless ones."""
        return self.process in _HUFFMAN_DCT


def read_header(data: bytes) -> JpegHeader:
    """Read a JPEG's segments up to its first scan, as libjpeg does.

    Raises `ImageRejected`: `unsupported` for a kind of JPEG that no decoder here reads, `truncated` when the file ends
    before a scan, and `corrupt` when a scan comes without a frame.
    """
    header = JpegHeader()
    frames = 0
    position = 2
    while match := _MARKER.search(data, position):
        marker, position = data[match.end() - 1], match.end()
        if marker in _BARE:
            continue
        if marker == _EOI:
            continue  # a stream of tables only; libjpeg goes on with the next one
        end = position + int.from_bytes(data[position : position + 2], "big")
        if marker in _UNSUPPORTED:
            raise ImageRejected("unsupported", _UNSUPPORTED[marker])
        if marker in _HUFFMAN_DCT or marker in _OTHERS:
            frames += 1
            _read_frame(header, marker, data[position + 2 : end])
        if marker == _SOS:
            header.scan = match.start()
            break
        header.segments.append((marker, match.start(), end))
        position = max(end, position)
        if len(header.segments) > _MOST_SEGMENTS:
            raise ImageRejected("unsupported", f"JPEG with over {_MOST_SEGMENTS} segments before its pixels")
    else:
        raise ImageRejected("truncated", "the JPEG ends before its first scan")
    if not frames:
        raise ImageRejected("corrupt", "a JPEG with a scan and no frame")
    if frames > 1:
        raise ImageRejected("unsupported", "JPEG with several frames")
    _check_frame(header)
    return header


def _read_frame(header: JpegHeader, marker: int, frame: bytes) -> None:
    if len(frame) < 6 or len(frame) < 6 + 3 * frame[5]:
        raise ImageRejected("corrupt", "the JPEG's frame header is too short")
    header.process, header.precision = marker, frame[0]
    header.height, header.width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    header.components = tuple(frame[6 : 6 + 3 * frame[5] : 3])


def _check_frame(header: JpegHeader) -> None:
    if header.precision != 8:
        raise ImageRejected("unsupported", f"JPEG with {header.precision} bits per sample")
    if len(header.components) not in (1, 3, 4):
        raise ImageRejected("unsupported", f"JPEG with {len(header.components)} components")
    if not header.height:
        raise ImageRejected("unsupported", "JPEG whose height is not in its frame header (DNL)")
    if not header.width:
        raise ImageRejected("corrupt", "a JPEG with a width of 0")


def decode_jpeg(data: bytes, header: JpegHeader, shrink: int) -> Pixels | None:
    """Decode a JPEG with libjpeg directly, to uint8 (H, W, 3). None for an image that Pillow must decode.

    The pixels are those of Pillow, in two thirds of its time: Pillow has libjpeg write line by line, widens each pixel
    to four bytes, and NumPy packs them again. Pillow decodes images that are not a JPEG in RGB or grey, those that are
    not baseline, extended or progressive, and images about which libjpeg reports a problem: Pillow then decides whether
    they are valid. `shrink` is 1, 2, 4 or 8. Raises `ImageRejected` for an image without a scan of a component.
    """
    if not header.shrinkable or len(header.components) == 4:
        return None
    try:
        pixels = _run_libjpeg(data, header, shrink)
    except ValueError as error:
        if "memory" in str(error):
            raise MemoryError(str(error)) from None
        return None
    if header.process in _PROGRESSIVE or data[header.scan + 4] < len(header.components):
        _check_scans(_read_scans(data, header))
    return pixels


def close_jpeg(data: bytes, header: JpegHeader) -> bytes:
    """Return a JPEG with its end marker, added where it is missing and all pixels are there.

    What a download or a disk leaves behind such a file (zeros) is removed. Raises `ImageRejected`: `truncated` when
    pixels are missing. libjpeg has no warning about an arithmetic JPEG that is cut short, so such a file needs its end
    marker.
    """
    scans = _read_scans(data, header)
    if scans.ended:
        _check_scans(scans)
        return data
    rest = data.rstrip(b"\0")
    candidates = [rest + _END] + ([rest + b"\0" + _END] if rest.endswith(b"\xff") else [])  # FF 00 is a sample's byte
    for closed in candidates if header.shrinkable and scans.complete else []:
        try:
            _run_libjpeg(closed, header, 1)
        except ValueError:
            continue
        return closed
    raise ImageRejected("truncated", "the JPEG ends before its last pixels")


def check_padding(data: bytes, header: JpegHeader, pixels: Pixels) -> None:
    """Raise `ImageRejected` (`truncated`) when libjpeg has filled in a row of blocks or more, or all of a later scan.

    It gives all pixels behind the end of a scan's data one colour. `pixels` are those that Pillow decoded, uint8
    (H, W, 3). A file that lacks less than a row is tagged, like one that is damaged elsewhere.
    """
    filled = bool((pixels[-_BLOCK_ROWS:] == pixels[-1, -1]).all())
    if header.shrinkable and (filled or (header.process in _PROGRESSIVE and not _read_scans(data, header).complete)):
        try:
            _run_libjpeg(data, header, 1)
        except ValueError as error:
            if "premature end of data segment" in str(error):
                raise ImageRejected("truncated", "the JPEG's data end before its last pixels") from None


def strip_jpeg(data: bytes, header: JpegHeader, exif: bool) -> bytes:
    """Return a JPEG without comments and without application segments that do not matter to pixels.

    Pillow parses previews, ICC profiles and image resources in such segments, and rejects the image for a broken one.
    The first segments of JFIF and Adobe stay, and with `exif` those of EXIF and XMP, which say how the image is turned.
    """
    parts, seen = [data[:2]], set[bytes]()
    for marker, start, end in header.segments:
        if 0xE0 <= marker <= 0xEF or marker >= 0xF0:
            name = next((name for name in _KEPT if data.startswith(name, start + 4)), b"")
            broken = name in (b"JFIF\0", b"Adobe") and end - start < (18 if name == b"JFIF\0" else 16)
            if not name or name in seen or _KEPT[name] != marker or broken or (marker == 0xE1 and not exif):
                continue
            seen.add(name)
        parts.append(data[start:end])
    return b"".join([*parts, data[header.scan :]])


def _run_libjpeg(data: bytes, header: JpegHeader, shrink: int, strict: bool = True) -> Pixels:
    """Decode with libjpeg. Raises `ValueError` with libjpeg's text for its errors, and if `strict` for its warnings.

    The buffer for a smaller image has room for the whole one, whatever libjpeg makes of the wish to shrink it: for a
    lossless JPEG libjpeg-turbo before 3.1.4.1 ignored the wish, and wrote the whole image. Pages of a buffer that are
    not written cost nothing.
    """
    import simplejpeg

    colors = "CMYK" if len(header.components) == 4 else "RGB"
    height, width = (-(-side // shrink) for side in (header.height, header.width))
    buffer = np.empty(header.height * header.width * len(colors), np.uint8) if shrink > 1 else None
    pixels: Pixels = simplejpeg.decode_jpeg(
        data, colors, min_height=height, min_width=width, buffer=buffer, strict=strict
    )
    if pixels.shape != (height, width, len(colors)):
        raise ValueError(f"libjpeg found another size: {pixels.shape[1]} x {pixels.shape[0]}")
    return pixels


@dataclass(frozen=True)
class _Scans:
    """`missing`: components without a scan. `complete`: all coefficients came in full. `ended`: an end marker."""

    missing: list[int]
    complete: bool
    ended: bool


def _read_scans(data: bytes, header: JpegHeader) -> _Scans:
    """Find all scans of a file, by their headers."""
    bits = {component: [-1] * 64 for component in header.components}  # by coefficient: low bits still missing, -1 all
    position, ended = header.scan, False
    while match := _SCAN_END.search(data, position):
        marker, position = data[match.end() - 1], match.end()
        if marker == _EOI:
            ended = True
            break
        if marker in _BARE:
            continue
        end = position + int.from_bytes(data[position : position + 2], "big")
        segment = data[position + 2 : end]
        if marker == _SOS and segment and len(segment) >= 4 + 2 * segment[0]:
            first, last, high, low = 0, 63, 0, 0
            if header.process in _PROGRESSIVE:
                first, last, high, low = segment[-3], segment[-2], segment[-1] >> 4, segment[-1] & 15
            for component in segment[1 : 1 + 2 * segment[0] : 2]:
                received = bits.get(component, [])
                for n in range(first, min(last + 1, len(received))):
                    if received[n] == (high or -1):  # a first scan, or one that refines what came before
                        received[n] = low
        position = max(end, position)
    missing = [component for component, received in bits.items() if received[0] < 0]
    return _Scans(missing, all(not any(received) for received in bits.values()), ended)


def _check_scans(scans: _Scans) -> None:
    if scans.missing:
        raise ImageRejected("unsupported", f"JPEG without a scan of component {scans.missing[0]}")
