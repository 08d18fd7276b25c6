"""Names of formats that are not read, by their first bytes."""

from __future__ import annotations

_NOT_READ: tuple[tuple[bytes, str], ...] = (
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"8BPS", "Photoshop (PSD)"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"\x8aMNG\r\n\x1a\n", "MNG"),
    (b"\x8bJNG\r\n\x1a\n", "JNG"),
    (b"\0\0\x01\0", "Windows icon"),
    (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"DDS ", "DDS"),
    (b"gimp xcf", "GIMP (XCF)"),
    (b"FUJIFILMCCD-RAW", "camera raw (Fujifilm)"),
    (b"FOVb", "camera raw (Sigma)"),
    (b"\0MRM", "camera raw (Minolta)"),
    (b"IIRO", "camera raw (Olympus)"),
    (b"IIRS", "camera raw (Olympus)"),
    (b"MMOR", "camera raw (Olympus)"),
    (b"IIU\0", "camera raw (Panasonic)"),
)

_TEXTUAL = (b"%PDF", b"%!PS", b"#?RADIANCE", b"FUJIFILMCCD-RAW")
"""Formats whose first bytes are readable text, so that a text may be one."""


def is_text(data: bytes) -> bool:
    """Whether a file starts as a text does: no control characters, in UTF-8. Headers of images have bytes of zero.

    Some formats have first bytes of two or four letters, with which a text may start too.
    """
    head = data[:64]
    try:
        head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3 or len(data) <= len(head):  # else a character that the cut has split
            return False
    return not any(byte < 9 or 13 < byte < 32 or byte == 127 for byte in head)


def name_unread_format(data: bytes) -> str | None:
    """Name the format of a file that is an image or a page, and that is not read; None for other bytes."""
    if data[:4] in (b"II*\0", b"MM\0*") and data[8:10] == b"CR":
        return "camera raw (Canon)"
    if data[4:12] == b"ftypcrx ":
        return "camera raw (Canon)"
    text = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<svg") or (text.startswith((b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in text):
        return "SVG"
    found = next(((start, name) for start, name in _NOT_READ if data.startswith(start)), None)
    if found is None or (is_text(data) and not found[0].startswith(_TEXTUAL)):
        return None
    return found[1]
