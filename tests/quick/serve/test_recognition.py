"""Which strings are images: data: URIs, base64 of image files, URLs of images; and which are texts."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from serve.fetch.images import read_inline
from serve.fetch.recognition import is_damaged_image, is_image, is_image_url

FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "ICO"]


def make_image(kind: str) -> bytes:
    """Return an image of 16 x 16 pixels in one of Pillow's formats."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_base64_of_every_image_format_is_an_image(kind: str) -> None:
    data = make_image(kind)
    plain = base64.b64encode(data).decode()
    lines = base64.encodebytes(data).decode()
    urlsafe = base64.urlsafe_b64encode(data).decode().rstrip("=")
    for text in (plain, lines, urlsafe, f"\n \t{plain}", lines.replace("\n", "\r\n"), plain[:60]):
        assert is_image(text), text[:80]
    assert not is_image("the file " + plain)


def test_heif_and_big_endian_tiff_are_recognised_by_their_first_bytes() -> None:
    for head in (b"\0\0\0\x18ftypheic", b"\0\0\0\x1cftypmif1", b"MM\0*\0\0\0\x08", b"RIFF\x10\0\0\0WEBPVP8 "):
        assert is_image(base64.b64encode(head + bytes(40)).decode())
    assert not is_image(base64.b64encode(b"RIFF\x10\0\0\0WAVEfmt " + bytes(40)).decode())
    assert not is_image(base64.b64encode(b"\0\0\0\x18ftypisom" + bytes(40)).decode())


@pytest.mark.parametrize(
    "text",
    ["data:image/png;base64,iVBO", "DATA:IMAGE/JPEG;BASE64,/9j/", " \n data:image/webp;base64,",
     "data:image/png;base64", "data:;base64,iVBO", "data:application/octet-stream;base64,AA",
     "data:image/svg+xml;utf8,<svg/>", "data:,x"],
)  # fmt: skip
def test_data_uris_are_images(text: str) -> None:
    assert is_image(text)


@pytest.mark.parametrize(
    "text",
    ["", "a photo of a cat", "data: the new oil, they say", "data:the new oil, they say", "Qk", "/9j/", "R0lGODlh",
     "supercalifragilisticexpialidocious", "BM" * 40, "Qk" * 40, "a" * 5000, "/9j/ is how a JPEG begins in base64",
     "iVBORw0KGgo is how a PNG begins in base64, and that is text", "東京" * 40, "e" * 31 + "ü" * 40,
     "UklGR is RIFF, and then comes WEBP or WAVE, as you like it", "cat\ndog\nred", "a" * 70 + "\n" + "a" * 71,
     "word " * 14 + "words\n" + "word " * 14, "a" * 59 + "\n" + "a" * 59, "a" * 76],
)  # fmt: skip
def test_texts_are_no_images(text: str) -> None:
    assert not is_image(text)
    assert is_damaged_image(text) == (text == "a" * 5000)
    assert not is_image_url(text)


@pytest.mark.parametrize(
    ("url", "expected"),
    [("https://example.com/cat.jpg", True), ("HTTP://EXAMPLE.COM/C.JPEG", True), (" http://a.example/x.webp\n", True),
     ("https://a.example/cat.png?size=2&v=1", True), ("https://a.example/cat.gif#top", True),
     ("https://a.example/image?file=cat.avif", True), ("https://a.example/", False), ("https://a.example/jpg", False),
     ("see https://a.example/cat.jpg", False), ("https://a.example/cat.jpg shows a cat", False), ("cat.jpg", False),
     ("https://[/cat.jpg", True), ("https://a.example/cat.html?x=.jpg.html", False)],
)  # fmt: skip
def test_urls_of_images_are_recognised_by_their_suffix(url: str, expected: bool) -> None:
    assert is_image_url(url) is expected


def test_percent_encoded_base64_of_a_data_uri_is_decoded() -> None:
    data = bytes(range(256)) + b"\xff\xef\xbe"
    plain = base64.b64encode(data).decode()
    encoded = plain.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    assert "%2B" in encoded
    assert "%2F" in encoded
    for text in (plain, encoded, f" {encoded}"):
        assert read_inline(f"data:image/png;base64,{text}", "image") == data
    assert read_inline(f"  data:image/png;base64,{encoded}", "image") == data
