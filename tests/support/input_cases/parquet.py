"""Cases of the section "Parquet files"."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.inputs.parquet.file import FILES_OF_URLS
from tests.support.input_cases.case import InputCase


def _encode(color: str, format_: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(buffer, format_)
    return buffer.getvalue()


ONE, TWO = _encode("red"), _encode("blue")
_PAIR = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_IMAGE, _AUDIO = {"_type": "Image"}, {"_type": "Audio"}


def _table(**columns: Any) -> Callable[[Path], object]:
    return lambda folder: pq.write_table(pa.table(columns), folder / "a.parquet")


def _declared(features: Any, **columns: Any) -> Callable[[Path], object]:
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return lambda folder: pq.write_table(pa.table(columns).replace_schema_metadata(metadata), folder / "a.parquet")


def _pairs(*values: bytes) -> pa.Array:
    return pa.array([{"bytes": value, "path": "x.jpg"} for value in values], _PAIR)


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [ONE, TWO]}), buffer, compression="none", use_dictionary=False)
    return lambda folder: (folder / "a.parquet").write_bytes(change(buffer.getvalue()))


def _twice(name: str) -> Callable[[Path], object]:
    table = pa.Table.from_arrays([pa.array([ONE]), pa.array([TWO])], [name, name])
    return lambda folder: pq.write_table(table, folder / "a.parquet")


def _linked(values: list[str | None]) -> Callable[[Path], object]:
    def build(folder: Path) -> None:
        (folder / "linked").mkdir()
        (folder / "linked/1.jpg").write_bytes(ONE)
        pq.write_table(pa.table({"image_path": values}), folder / "a.parquet")

    return build


def _path_structs(folder: Path) -> None:
    (folder / "linked").mkdir()
    (folder / "linked/1.jpg").write_bytes(ONE)
    values = [{"bytes": None, "path": "linked/1.jpg"}, {"bytes": None, "path": "linked/no.jpg"}]
    pq.write_table(pa.table({"image": values}), folder / "a.parquet")


def _beside_an_image(build: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: (build(folder), (folder / "b.jpg").write_bytes(ONE))


_ONLY = {"input": "{folder}/a.parquet"}

TITLE = "Parquet files"
TEXT = (
    "A row is an image, or a list of images. The image column of a file is the first of these that there is: "
    "`parquet.image_column`; what Hugging Face's schema metadata declares an `Image`; a column with the name of "
    "an image (`image`, `img`, `jpg`, `image_bytes`, ...) that holds bytes; a column with the name of a file's "
    "content (`content`, `bytes`, ...) that holds bytes, or with the name of an image (`image_url`, `image_path`, "
    "...) that holds URIs; the only column with bytes, or with the name of a URI (`url`, `path`, `file_name`, "
    "...). Names count as a whole, without case, `_`, `-` and spaces. The run prints which column it reads. It "
    "stays in the plan: a later run reads the same one."
)
CASES: tuple[InputCase, ...] = (
    InputCase(
        "`image` beside `image_thumbnail`",
        "`image`: a name counts as a whole",
        _table(image_thumbnail=[b"x"] * 2, image=[ONE, TWO]),
        2,
    ),
    InputCase(
        "`mask_png` beside `image_bytes`", "`image_bytes`", _table(mask_png=[b"x"] * 2, image_bytes=[ONE, TWO]), 2
    ),
    InputCase(
        "`image_embedding` beside `content`", "`content`", _table(image_embedding=[b"x"] * 2, content=[ONE, TWO]), 2
    ),
    InputCase(
        "Hugging Face `datasets`: an `Audio` column before an `Image` column",
        "the declared `Image`, whatever the names are",
        _declared({"image": _AUDIO, "x": _IMAGE}, image=_pairs(b"a", b"b"), x=_pairs(ONE, TWO)),
        2,
    ),
    InputCase(
        "structs {bytes, path}",
        "the bytes, else the path as a URI; the path is the key",
        _table(image=_pairs(ONE, TWO)),
        2,
    ),
    InputCase(
        "structs {path}, or {bytes, path} without any bytes",
        "the path as a URI",
        _path_structs,
        1,
        {"missing": 1},
        settings=_ONLY,
    ),
    InputCase("a struct whose `bytes` is a number", "no image column", _table(stats=[{"bytes": 7}], image=[ONE]), 1),
    InputCase(
        "one column of bytes with any name", "read, since it is the only one", _table(payload=[ONE, TWO], n=[1, 2]), 2
    ),
    InputCase("bytes and a URL", "the bytes", _table(url=["https://host/1.jpg"], image=[ONE]), 1),
    InputCase(
        "two columns that may hold the images",
        "set `parquet.image_column`",
        _table(image=[ONE], img=[TWO]),
        refused="'image' and 'img'",
    ),
    InputCase(
        "the same with `parquet.image_column`",
        "the configured column",
        _table(image=[b"x"], img=[TWO]),
        1,
        settings={"parquet": {"image_column": "img"}},
    ),
    InputCase(
        "a field of a struct", "read; `parquet.image_column` takes `a.image`", _table(a=[{"image": ONE, "n": 1}]), 1
    ),
    InputCase(
        "lists of images",
        "each image is a row, with the row's number and its position as key",
        _table(images=[[ONE, TWO], [ONE]]),
        3,
    ),
    InputCase(
        "an empty list of images",
        "counted",
        _table(images=pa.array([[ONE], []], pa.list_(pa.binary()))),
        1,
        skipped={"Parquet rows with an empty list of images": 1},
    ),
    InputCase("dictionary-encoded bytes", "read", _table(image=pa.array([ONE, TWO, ONE]).dictionary_encode()), 3),
    InputCase("a null", "the other rows are read", _table(image=[ONE, None]), 1, {"missing": 1}),
    InputCase(
        "URIs, relative to the file's folder",
        "fetched; one of no object is rejected",
        _linked(["linked/1.jpg", "linked/no.jpg", None]),
        1,
        {"missing": 2},
        settings=_ONLY,
    ),
    InputCase(
        "images as text: base64, and data: URIs",
        "decoded",
        _table(image=[base64.b64encode(ONE).decode(), f"data:image/jpeg;base64,{base64.b64encode(TWO).decode()}"]),
        2,
    ),
    InputCase(
        "http(s) URLs and no other URIs, as `img2dataset` writes beside its tars",
        "counted, in a folder. A file that is itself an input is a list: see [Images on the web](#images-on-the-web)",
        _beside_an_image(_table(url=[f"https://host/{n}.jpg" for n in range(9)], n=list(range(9)))),
        1,
        skipped={FILES_OF_URLS: 1},
    ),
    InputCase("no image column", "counted", _table(n=[1]), refused="1 Parquet files without an image column"),
    InputCase(
        "two columns of one name", "the file is one row in `rejects/`", _twice("image"), 0, {"corrupt_archive": 1}
    ),
    InputCase(
        "arrays of pixels", "expected are encoded images", _table(image=[[[1, 2], [3, 4]]]), 0, {"corrupt_archive": 1}
    ),
    InputCase(
        "arrays of pixels, or a map, beside bytes with another name",
        "set `parquet.image_column`",
        _table(image=[[1, 2]], sha256=[b"x"]),
        refused="'image' of list<element: int64>, which is not read",
    ),
    InputCase(
        "a value over `limits.max_bytes`",
        "not copied; but pyarrow decodes a page, and a row with a list of images, as a whole before",
        _table(image=[ONE, ONE + bytes(5000)]),
        1,
        {"too_many_bytes": 1},
        settings={"limits": {"max_bytes": 5000}},
    ),
    InputCase(
        "a file that ends early",
        "its footer is missing, so nothing of it can be read",
        _bytes(lambda data: data[:-20]),
        0,
        {"corrupt_archive": 1},
    ),
    InputCase(
        "a damaged page",
        "from this page on the file is one row in `rejects/`",
        _bytes(lambda data: data[:4] + b"\xff" * 40 + data[44:]),
        0,
        {"corrupt_archive": 1},
    ),
    InputCase(
        "a key column of lists or structs",
        "set `parquet.key_column` to a column of text or numbers",
        _table(image=[ONE], id=[[1]]),
        settings={"parquet": {"key_column": "id"}},
        refused="expected text or a number",
    ),
)
