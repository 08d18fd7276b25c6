"""Forms (multipart/form-data, RFC 7578), parsed in memory: the body is there already, and is bounded.

Nothing of a form is dropped or guessed: a form that ends early, text that is not valid in its charset, and a part with
a transfer encoding are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serve.http.errors import ApiError
from serve.http.quoting import quote, shorten

CHARSETS = ("utf-8", "us-ascii", "iso-8859-1", "windows-1252")
"""Charsets that a form, or a part of one, may name. Without one it is UTF-8."""
PLAIN_ENCODINGS = ("", "7bit", "8bit", "binary")
"""Values of Content-Transfer-Encoding that leave a part's bytes as they are."""


@dataclass
class FormPart:
    """A part of a form. `value` is its text, or its bytes if it is a file, which is a part with a file name."""

    name: str
    value: str | bytes


def parse_form(body: bytes, content_type: str, most: int) -> list[FormPart]:
    """The parts of a form in their order, at most `most`. `content_type` is the request's header. Raises `ApiError`."""
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise _refuse("Content-Type has no boundary")
    reader = _Reader(most)
    try:
        MultipartParser(
            boundary,
            {
                "on_part_begin": reader.begin,
                "on_header_field": reader.add_name,
                "on_header_value": reader.add_value,
                "on_header_end": reader.end_header,
                "on_part_data": reader.add_data,
                "on_part_end": reader.end_part,
                "on_end": reader.end,
            },
        ).write(body)
    except FormParserError as error:
        raise _refuse(shorten(str(error))) from None
    if not reader.complete:
        raise _refuse("it ends before the last boundary")
    charset = options.get(b"charset", b"").decode("latin-1")
    return [_read_part(part, charset) for part in reader.parts]


@dataclass
class _RawPart:
    headers: dict[bytes, bytes] = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)


class _Reader:
    """Collects the parts that the parser reports. `complete` tells whether the form's end was there."""

    def __init__(self, most: int) -> None:
        self.parts: list[_RawPart] = []
        self.complete = False
        self._most = most
        self._name = self._value = b""

    def begin(self) -> None:
        if len(self.parts) == self._most:
            raise ApiError("invalid_request", f"the form has more than {self._most} parts: send fewer images or labels")
        self.parts.append(_RawPart())

    def add_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def end_header(self) -> None:
        self.parts[-1].headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def add_data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].data += data[start:end]

    def end_part(self) -> None:
        pass

    def end(self) -> None:
        self.complete = True


def _read_part(part: _RawPart, charset: str) -> FormPart:
    """Decode a part. `charset` is the whole form's, empty if it names none."""
    _, options = parse_options_header(part.headers.get(b"content-disposition"))
    if b"name" not in options:
        raise _refuse("a part has no name in its Content-Disposition")
    name = _decode(options[b"name"], charset, "a field's name")
    encoding = part.headers.get(b"content-transfer-encoding", b"").decode("latin-1")
    if encoding.strip().lower() not in PLAIN_ENCODINGS:
        raise _refuse(f"{shorten(name)} has the Content-Transfer-Encoding {quote(encoding)}: send it without")
    if b"filename" in options:
        return FormPart(name, bytes(part.data))
    _, about = parse_options_header(part.headers.get(b"content-type"))
    own = about.get(b"charset", b"").decode("latin-1")
    return FormPart(name, _decode(bytes(part.data), own or charset, shorten(name)))


def _decode(data: bytes, charset: str, what: str) -> str:
    charset = charset.strip().lower() or CHARSETS[0]
    if charset not in CHARSETS:
        raise _refuse(f"{what} has the charset {quote(charset)}: send UTF-8")
    try:
        return data.decode(charset)
    except UnicodeDecodeError:
        raise _refuse(f"{what} is not valid {charset}: send UTF-8") from None


def _refuse(why: str) -> ApiError:
    return ApiError("invalid_request", f"the form cannot be read: {why}")
