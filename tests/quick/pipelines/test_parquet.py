"""Parquet files: which column is read, what comes out of it, and that an odd file is one reject row and no error."""

from __future__ import annotations

import base64
import datetime
import io
import json
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption

from pipelines.inputs.formats import read_inputs
from pipelines.inputs.parquet import file as parquet_file
from pipelines.inputs.parquet import rows as parquet_rows
from pipelines.inputs.parquet.file import FILES_OF_URLS
from pipelines.inputs.parquet.footer import read_bounds
from pipelines.inputs.rows import Reading, Row, Skipped
from pipelines.output.output import Output
from pipelines.planning.plan import list_shards, read_shard_inputs
from storage.files import StoreFile
from storage.local import LocalStore
from storage.settings import ConfigError
from tests.support.images import encode, make_rgb
from tests.support.input_folder import OPTIONS, Folder, outcomes

JPEG = encode(make_rgb(), "JPEG")
GOOD, BAD = pa.array([JPEG, JPEG]), pa.array([b"no", b"image"])
OTHER = encode(make_rgb(seed=1), "PNG")
PNG_TEXT = base64.b64encode(encode(make_rgb(), "PNG")).decode()
PAIR = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def write(folder: Folder, table: pa.Table, name: str = "a.parquet", **options: Any) -> Path:
    path = folder.input / name
    pq.write_table(table, path, **options)
    return path


def pairs(*values: bytes | None) -> pa.Array:
    return pa.array([None if value is None else {"bytes": value, "path": "p"} for value in values], PAIR)


def with_features(table: pa.Table, features: Any) -> pa.Table:
    """A table with the metadata that Hugging Face `datasets` writes."""
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


IMAGE, AUDIO = {"_type": "Image"}, {"_type": "Audio"}
CHOICES: dict[str, tuple[pa.Table, str]] = {
    "image, not its thumbnail": (pa.table({"image_thumbnail": BAD, "image": GOOD}), "image"),
    "a whole name": (pa.table({"mask_png": BAD, "image_bytes": GOOD}), "image_bytes"),
    "content, not an embedding": (pa.table({"image_embedding": BAD, "content": GOOD}), "content"),
    "as metadata says": (
        with_features(pa.table({"image": BAD, "x": pairs(JPEG, JPEG)}), {"image": {"_type": "Value"}, "x": IMAGE}),
        "x",
    ),
    "no audio": (with_features(pa.table({"audio": pairs(b"1", b"2"), "x": GOOD}), {"audio": AUDIO}), "x"),
    "no PDF named image": (
        with_features(pa.table({"image": pairs(b"1", b"2"), "x": GOOD}), {"image": {"_type": "Pdf"}}),
        "x",
    ),
    "audio without metadata": (pa.table({"audio": pairs(b"1", b"2"), "image": pairs(JPEG, JPEG)}), "image"),
    "of two declared, the named": (
        with_features(pa.table({"mask": BAD, "image": GOOD}), {"mask": IMAGE, "image": IMAGE}),
        "image",
    ),
    "a struct of counts is no image": (
        pa.table({"stats": pa.array([{"bytes": 7}, {"bytes": 1}]), "image": GOOD}),
        "image",
    ),
    "the only one with bytes": (pa.table({"n": [1, 2], "payload": GOOD}), "payload"),
    "bytes before URLs": (pa.table({"url": ["x", "y"], "image": GOOD}), "image"),
    "case and underscores": (pa.table({"X": BAD, "Image Bytes": GOOD}), "Image Bytes"),
    "hashes have a fixed length": (pa.table({"md5": pa.array([b"x" * 16] * 2, pa.binary(16)), "x": GOOD}), "x"),
    "dictionary": (pa.table({"image": GOOD.dictionary_encode()}), "image"),
    "view": (pa.table({"image": GOOD.cast(pa.binary_view())}), "image"),
    "fixed size": (pa.table({"image": GOOD.cast(pa.binary(len(JPEG)))}), "image"),
    "a field of a struct": (pa.table({"a": [{"image": JPEG, "n": 1}, {"image": JPEG, "n": 2}]}), "a.image"),
    "top level before fields": (pa.table({"a": [{"image": b"x"}] * 2, "image": GOOD}), "image"),
    "a field of a field": (pa.table({"a": [{"b": {"img": {"bytes": JPEG, "path": None}}}] * 2}), "a.b.img"),
    "declared in a struct": (
        with_features(pa.table({"a": [{"left": JPEG, "right": b""}] * 2}), {"a": {"left": IMAGE}}),
        "a.left",
    ),
    "a camera, as LeRobot names it": (
        with_features(pa.table({"a.wrist": BAD, "a.top": pairs(JPEG, JPEG)}), {"a.top": IMAGE, "a.wrist": AUDIO}),
        "a.top",
    ),
    "duplicates elsewhere": (pa.Table.from_arrays([BAD, BAD, GOOD], ["x", "x", "image"]), "image"),
    "a dot in a struct's name": (pa.table({"my.a": [{"image": JPEG}] * 2}), "my.a.image"),
    "a dot in the name": (pa.table({"a.b": BAD, "my.image": GOOD, "image": GOOD}), "image"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_image_column(folder: Folder, name: str) -> None:
    table, column = CHOICES[name]
    path = write(folder, table)
    report = folder.plan()
    assert report.columns.describe() == [f"column `{column}` of {path}"]
    assert [row.data for row in folder.rows()] == [JPEG, JPEG]


def parquet_forms() -> Iterator[tuple[str, pa.Table, dict[str, Any], list[str]]]:
    images = [JPEG, None, JPEG]
    structs = [{"bytes": JPEG, "path": "x/1.jpg"}, None, {"bytes": JPEG, "path": None}]
    yield "bytes", pa.table({"id": [7, 8, 9], "image": pa.array(images, pa.binary())}), {}, ["0", "1", "2"]
    yield (
        "large bytes",
        pa.table({"jpg": pa.array(images, pa.large_binary()), "mask": [b"", b"", b""]}),
        {},
        ["0", "1", "2"],
    )
    yield "struct", pa.table({"image": structs, "label": [1, 2, 3]}), {}, ["x/1.jpg", "1", "2"]
    yield "keys", pa.table({"id": ["a", "b", "c"], "image": images}), {"key_column": "id"}, ["a", "b", "c"]
    uris = ["loose/1.jpg", None, "loose/2.jpg"]
    yield "uris", pa.table({"url": uris, "other": [1, 2, 3]}), {}, ["0", "1", "2"]
    yield "named", pa.table({"x": images, "y": [b"", b"", b""]}), {"image_column": "x"}, ["0", "1", "2"]
    yield "field", pa.table({"a": [{"x": i, "y": b""} for i in images]}), {"image_column": "a.x"}, ["0", "1", "2"]


@pytest.mark.parametrize(("name", "table", "keys", "expected"), [*parquet_forms()], ids=[f[0] for f in parquet_forms()])
def test_parquet_in_every_form(
    folder: Folder, name: str, table: pa.Table, keys: dict[str, Any], expected: list[str]
) -> None:
    (folder.output.parent / "loose").mkdir()
    for number in (1, 2):
        (folder.output.parent / f"loose/{number}.jpg").write_bytes(JPEG)
    pq.write_table(table, folder.input.parent / "images.parquet", row_group_size=2)
    columns = [c for c in ("label", "other") if c in table.schema.names]
    rows = folder.rows(
        input=str(folder.input.parent / "images.parquet"), parquet={**keys, "columns": columns}, rows_per_shard=2
    )
    assert [row.key for row in rows] == expected
    assert [row.data for row in rows] == [JPEG, None, JPEG]
    assert [row.rejected.reason if row.rejected else None for row in rows] == [None, "missing", None]
    found = [{name: value[0].as_py() for name, value in row.columns.items()} for row in rows]
    assert found == [{c: table[c][n].as_py() for c in columns} for n in range(3)]
    assert folder.plan(input=str(folder.input.parent / "images.parquet"), parquet=keys).inputs == 0


EQUAL: dict[str, tuple[pa.Table, str]] = {
    "two names": (pa.table({"image": GOOD, "img": GOOD}), "'image' and 'img'"),
    "two cases": (pa.table({"image": GOOD, "IMAGE": GOOD}), "'IMAGE' and 'image'"),
    "no names": (pa.table({"left": GOOD, "right": GOOD, "text": ["x", "y"]}), "'left' and 'right'"),
    "two declared": (
        with_features(pa.table({"left": GOOD, "right": GOOD}), {"left": IMAGE, "right": IMAGE}),
        "'left' and 'right'",
    ),
    "two URIs": (pa.table({"image_url": ["x", "y"], "image_path": ["x", "y"]}), "'image_path' and 'image_url'"),
    "bytes and a name": (pa.table({"x": GOOD, "image_name": ["x", "y"]}), "'image_name' and 'x'"),
    "bytes and a path": (pa.table({"x": GOOD, "file_name": ["x", "y"]}), "'file_name' and 'x'"),
    "content and a string": (pa.table({"content": GOOD, "image": ["x", "y"]}), "'content' and 'image'"),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_candidates_are_refused(folder: Folder, name: str) -> None:
    table, names = EQUAL[name]
    path = write(folder, table)
    with pytest.raises(ConfigError, match=rf"parquet\.image_column: {path} has the columns {names}, and"):
        folder.plan()
    column = table.schema.names[0]
    assert folder.plan(parquet={"image_column": column}).columns.describe() == [f"column `{column}` of {path}"]


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("image", pa.array([[1, 2], [3, 4]], pa.list_(pa.uint8()))),
        ("images", pa.array([[[1.0]], [[2.0]]])),
        ("Image", pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((2, 3, 3), np.uint8))),
        ("image", pa.array([[("a", b"x")]] * 2, pa.map_(pa.string(), pa.binary()))),
        ("image", pa.array([{"bytes": [1], "path": "x"}] * 2)),
        ("pixels", pa.array([[1, 2], [3, 4]], pa.list_(pa.int16()))),
        ("views", pa.array([[("a", b"x")]] * 2, pa.map_(pa.string(), pa.binary()))),
    ],
)
@pytest.mark.parametrize("other", ["hash", "label"])
def test_no_other_column_is_taken_for_arrays_of_pixels(folder: Folder, name: str, image: pa.Array, other: str) -> None:
    write(folder, pa.table({name: image, other: GOOD}))
    with pytest.raises(ConfigError, match=rf"has the column '{name}' of .*which is not read.*set it to '{other}' if"):
        folder.plan()
    assert [row.data for row in folder.rows(parquet={"image_column": other})] == [JPEG, JPEG]


def test_arrays_beside_a_better_column_are_ignored(folder: Folder) -> None:
    write(folder, pa.table({"pixel_values": [[0.5]] * 2, "image": GOOD}))
    declared = pa.table({"image": [[1]] * 2, "x": pairs(JPEG, JPEG)})
    write(folder, with_features(declared, {"x": IMAGE}), "b.parquet")
    assert [row.data for row in folder.rows()] == [JPEG] * 4


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(
    "type_",
    [
        pa.struct([("bytes", pa.null()), ("path", pa.string())]),
        pa.struct([("path", pa.large_string())]),
        pa.struct([("width", pa.int64()), ("path", pa.dictionary(pa.int32(), pa.string()))]),
    ],
)
def test_structs_with_nothing_but_a_path_are_uris(folder: Folder, type_: pa.DataType, many: bool) -> None:
    """Arrow writes the type null for bytes that are all missing."""
    folder.write("loose/1.jpg", JPEG)
    values: list[Any] = [{"path": "loose/1.jpg"}, {"path": "loose/2.jpg"}]
    column = pa.array([values], pa.list_(type_)) if many else pa.array(values, type_)
    write(folder, pa.table({"image": column, "n": [1] * len(column)}))
    rows = folder.rows(input=str(folder.input / "a.parquet"))
    assert outcomes(rows) == [("loose/1.jpg", None), ("loose/2.jpg", "missing")]
    assert rows[0].data == JPEG


def test_lists_of_images_are_a_row_for_each_image(folder: Folder) -> None:
    images = pa.array([[b"0", b"1"], [], None, [b"2", None]], pa.list_(pa.binary()))
    write(folder, pa.table({"images": images, "id": list("abcd"), "n": [0, 1, 2, 3]}), row_group_size=3)
    rows = folder.rows(parquet={"columns": ["n"]})
    assert outcomes(rows) == [("0.0", None), ("0.1", None), ("2", "missing"), ("3.0", None), ("3.1", "missing")]
    assert [row.columns["n"][0].as_py() for row in rows] == [0, 0, 2, 3, 3]
    assert [row.data for row in rows] == [b"0", b"1", None, b"2", None]
    assert folder.skipped.counts == {"Parquet rows with an empty list of images": 1}
    assert [row.key for row in folder.rows(parquet={"key_column": "id"})][-2:] == ["d.0", "d.1"]


@pytest.mark.parametrize(
    ("table", "features"),
    [
        (pa.table({"x": pa.array([[{"bytes": JPEG, "path": "p"}] * 2], pa.list_(PAIR))}), {"x": [IMAGE]}),
        (
            pa.table({"x": pa.array([[{"bytes": JPEG, "path": "p"}] * 2], pa.large_list(PAIR)), "y": [BAD[0]]}),
            {"x": {"_type": "List", "feature": IMAGE}, "y": {"_type": "Value"}},
        ),
        (
            pa.table({"x": pa.array([{"image": [JPEG, JPEG]}]), "y": [b""]}),
            {"x": {"_type": "Sequence", "feature": {"image": IMAGE, "n": {"_type": "Value"}}}},
        ),
        (pa.table({"x": [[{"image": JPEG, "n": 1}, {"image": JPEG, "n": 2}]]}), {}),
        (pa.table({"images": pa.array([[JPEG, JPEG]], pa.list_(pa.binary(), 2))}), {}),
        (pa.table({"images": [[[JPEG], [JPEG]]]}), {}),
    ],
)
def test_nested_lists_of_images(folder: Folder, table: pa.Table, features: Any) -> None:
    write(folder, with_features(table, features))
    assert [row.data for row in folder.rows()] == [JPEG, JPEG]


def test_a_column_of_nulls_only_is_a_reject_for_each_row(folder: Folder) -> None:
    """pandas writes the type null where every value is missing."""
    write(folder, pa.table({"image": pa.nulls(2), "n": [1, 2]}))
    assert outcomes(folder.rows()) == [("0", "missing"), ("1", "missing")]


def test_large_lists_and_structs_are_read(folder: Folder) -> None:
    """pyarrow cannot read nested values in several chunks, which a batch of many bytes has."""
    image = bytes(3 << 20)
    write(folder, pa.table({"images": [[image] * 4] * 8}), compression="zstd")
    write(folder, pa.table({"image": pairs(*[image] * 32)}), "b.parquet", compression="zstd")
    assert [len(row.data or b"") for row in folder.rows()] == [len(image)] * 64


@pytest.fixture
def reading(folder: Folder) -> Callable[[], Iterator[Row]]:
    """Reads the rows of what is planned one by one: `Folder.rows` would hold them all."""

    def read() -> Iterator[Row]:
        config = folder.config()
        output = Output(config.output, OPTIONS)
        settings = Reading(OPTIONS, config.limits.max_bytes, config.parquet)
        for ref in list_shards(output):
            for _, row in read_inputs(read_shard_inputs(output, ref), settings, Skipped()):
                yield row

    return read


@pytest.mark.parametrize("form", ["dictionary", "dense", "struct", "lists"])
def test_values_that_repeat_are_not_decoded_all_at_once(
    folder: Folder, reading: Any, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """A dictionary holds a value once that is in each row: a file of some kilobytes may be gigabytes."""
    monkeypatch.setattr(parquet_file, "_REPEATED_BYTES", 4 << 20)
    image = bytes(3 << 20)
    column: pa.Array = pa.array([image] * 24)
    if form == "dictionary":
        column = pa.DictionaryArray.from_arrays(pa.array([0] * 24, pa.int32()), pa.array([image]))
    elif form == "struct":
        column = pairs(*[image] * 24)
    elif form == "lists":
        column = pa.array([[image]] * 24)
    write(folder, pa.table({"image": column}), compression="zstd", dictionary_pagesize_limit=100 << 20)
    folder.plan()
    before, peak, rows = pa.total_allocated_bytes(), 0, 0
    for row in reading():
        assert len(row.data or b"") == len(image)
        peak, rows = max(peak, pa.total_allocated_bytes() - before), rows + 1
    assert rows == 24
    assert peak < 7 * len(image)


def test_a_row_with_a_list_of_images_is_not_copied_as_a_whole(folder: Folder, reading: Any) -> None:
    write(folder, pa.table({"images": [[bytes(100_000)] * 200]}), compression="zstd")
    folder.plan()
    tracemalloc.start()
    try:
        assert sum(len(row.data or b"") for row in reading()) == 200 * 100_000
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form", ["bytes", "dictionary", "view", "struct", "base64", "fixed"])
def test_values_over_the_limit_are_not_copied(folder: Folder, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    def read(values: Any, position: int) -> bytes:
        pytest.fail("a value over the limit was copied")

    image = JPEG + bytes(5000)
    forms: dict[str, pa.Array] = {
        "bytes": pa.array([image]),
        "dictionary": pa.array([image]).dictionary_encode(),
        "view": pa.array([image], pa.binary_view()),
        "struct": pairs(image),
        "base64": pa.array([base64.b64encode(image * 4).decode()]),
        "fixed": pa.array([image], pa.binary(len(image))),
    }
    write(folder, pa.table({"image": forms[form]}))
    monkeypatch.setattr(parquet_rows._Values, "read", read)
    (row,) = folder.rows(limits={"max_bytes": 1000})
    assert row.rejected is not None
    assert row.rejected.reason == "too_many_bytes"


def test_what_images_as_text_are(folder: Folder) -> None:
    """A data: URI and base64 are images; a text that only looks like them is not."""
    folder.write("loose/1.jpg", JPEG)
    png = base64.b64decode(PNG_TEXT)
    texts = [
        f"data:image/png;base64,{PNG_TEXT}", PNG_TEXT, "loose/1.jpg", "data:,x", "data:image/png;base64,!!", "", None
    ]  # fmt: skip
    write(folder, pa.table({"image": texts}))
    rows = folder.rows(input=str(folder.input / "a.parquet"))
    assert [row.data for row in rows] == [png, png, JPEG, None, None, None, None]
    assert [row.rejected.reason for row in rows if row.rejected] == ["unreadable", "unreadable", "missing", "missing"]


def test_a_long_text_that_is_no_image_is_a_reject(folder: Folder) -> None:
    write(folder, pa.table({"image": ["x" * 9000]}))
    (row,) = folder.rows()
    assert "a text of 9000 bytes is no URI, and no image in base64" in str(row.rejected)


def test_files_of_urls_are_skipped_by_name(folder: Folder) -> None:
    """As `img2dataset` leaves beside its tars."""
    write(folder, pa.table({"url": [f"https://h/{n}.jpg" for n in range(500)], "key": range(500)}), row_group_size=100)
    write(folder, pa.table({"url": ["http://h/1.jpg", "x.jpg"] * 100}), "b.parquet")
    report = folder.plan()
    assert report.skipped.counts == {FILES_OF_URLS: 1}
    assert report.rows == 200


def test_what_is_planned_is_read(folder: Folder) -> None:
    """A plan stores the column. Plans of older versions do not; then the file is looked at again."""
    path = write(folder, pa.table({"x": GOOD, "y": BAD}))
    folder.plan(parquet={"image_column": "y"})
    output = Output(str(folder.output), OPTIONS)
    [planned] = [item for ref in list_shards(output) for item in read_shard_inputs(output, ref)]
    assert planned.column == "y"
    assert [row.data for row in folder.rows()] == BAD.to_pylist()
    assert [row.data for row in folder.rows(parquet={"image_column": "x"})] == BAD.to_pylist()  # one output, one column
    [plan] = (folder.output / "plan").iterdir()
    old = pq.read_table(plan).drop_columns(["column"])
    pq.write_table(old, plan)
    with pytest.raises(ConfigError, match=f"{path} has the columns 'x' and 'y'"):
        folder.rows()
    assert [row.data for row in folder.rows(parquet={"image_column": "x"})] == [JPEG, JPEG]


def test_columns_are_printed_with_counts(folder: Folder) -> None:
    for number in range(5):
        write(folder, pa.table({"image" if number < 3 else "photo": GOOD}), f"{number}.parquet")
    write(folder, pa.table({"n": [1]}), "n.parquet")
    report = folder.plan()
    assert report.columns.describe() == [
        f"column `image` of 3 Parquet files, such as {folder.input}/0.parquet",
        f"column `photo` of 2 Parquet files, such as {folder.input}/3.parquet",
    ]
    assert report.skipped.counts == {"Parquet files without an image column": 1}


def test_a_broken_parquet_file_is_a_row(folder: Folder) -> None:
    folder.write("a.parquet", b"PAR1 and then nothing like it")
    folder.write("b.jpg", JPEG)
    assert outcomes(folder.rows()) == [("a.parquet", "corrupt_archive"), ("b.jpg", None)]


def footer(change: Any, table: pa.Table | None = None, **options: Any) -> bytes:
    """A file of which bytes were replaced, so that it lies."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": GOOD}) if table is None else table, buffer, compression="none", **options)
    return bytes(change(buffer.getvalue()))


ODD: dict[str, tuple[pa.Table | bytes, str]] = {
    "two image columns of one name": (
        pa.Table.from_arrays([GOOD, GOOD], ["image", "image"]),
        "2 columns have the name",
    ),
    "arrays of pixels": (pa.table({"image": [[[1, 2], [3, 4]]]}), "image is list<.*expected encoded images"),
    "declared pixels": (with_features(pa.table({"x": [[1, 2]]}), {"x": IMAGE}), "x is list"),
    "a tensor": (
        pa.table({"image": pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((2, 3, 3), np.uint8))}),
        "expected encoded images",
    ),
    "a name in two ways": (
        with_features(pa.table({"a.image": BAD, "a": [{"image": JPEG}] * 2}), {"a": {"image": IMAGE}}),
        "2 columns have the name 'a.image'",
    ),
    "a struct of texts": (pa.table({"image": [{"bytes": "abc", "path": "x"}]}), "image is struct<"),
    "an encrypted footer": (b"PARE" + bytes(100) + (50).to_bytes(4, "little") + b"PARE", ""),
    "a footer beyond the file": (b"PAR1" + (2**31 - 1).to_bytes(4, "little") + b"PAR1", "footer has 2147483647 bytes"),
    "a footer of zeros": (b"PAR1" + bytes(100) + (90).to_bytes(4, "little") + b"PAR1", ""),
    "a name not in UTF-8": (footer(lambda data: data.replace(b"image", b"im\xff\xfee")), ""),
    "pages of noise": (footer(lambda data: data[:4] + b"\xf7" * 60 + data[64:]), ""),
    "empty": (b"", ""),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_a_row_that_says_why(folder: Folder, name: str) -> None:
    content, text = ODD[name]
    if isinstance(content, bytes):
        folder.write("a.parquet", content)
    else:
        write(folder, content)
    folder.write("b.jpg", JPEG)
    rows = folder.rows()
    assert outcomes(rows)[-2:] == [("a.parquet", "corrupt_archive"), ("b.jpg", None)]
    assert len(rows) == 2
    assert rows[0].rejected is not None
    assert re.search(text, rows[0].rejected.detail), rows[0].rejected.detail


class _Keys(encryption.KmsClient):  # type: ignore[misc]
    """Keys that are wrapped by nothing."""

    def __init__(self, config: Any) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, name: str) -> bytes:
        return base64.b64encode(key)


@pytest.mark.parametrize("readable_footer", [True, False])
def test_an_encrypted_file_is_a_row(folder: Folder, readable_footer: bool) -> None:
    """With a readable footer, pyarrow would end the process for the metadata of an encrypted column."""
    table = pa.table({"image": [JPEG] * 3, "n": [1, 2, 3], "m": [1, 2, 3]})
    properties = encryption.CryptoFactory(_Keys).file_encryption_properties(
        encryption.KmsConnectionConfig(),
        encryption.EncryptionConfiguration("f", column_keys={"k": ["image", "n"]}, plaintext_footer=readable_footer),
    )
    with pq.ParquetWriter(folder.input / "a.parquet", table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    write(folder, table, "b.parquet")
    rows = folder.rows(parquet={"columns": ["n"]})
    assert outcomes(rows) == [("a.parquet", "corrupt_archive"), ("0", None), ("1", None), ("2", None)]


@pytest.mark.parametrize(
    "error", [KeyError("x"), MemoryError("m"), TypeError("t"), OverflowError("o"), pa.ArrowKeyError("k")]
)
def test_no_error_of_pyarrow_ends_the_run(folder: Folder, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any, **keys: Any) -> Any:
        raise error

    write(folder, pa.table({"image": GOOD}))
    folder.write("b.jpg", JPEG)
    monkeypatch.setattr(parquet_file, "find_columns", fail)
    rows = folder.rows()
    reason = "out_of_memory" if isinstance(error, MemoryError) else "corrupt_archive"
    assert outcomes(rows) == [("a.parquet", reason), ("b.jpg", None)]
    assert rows[0].rejected is not None
    assert type(error).__name__ in rows[0].rejected.detail or isinstance(error, pa.ArrowException)


def test_a_footer_that_lies_about_rows_is_said(folder: Folder) -> None:
    """The rows that are there are read; where the footer says fewer, the rest is lost and the file says so."""
    table = pa.table({"image": pa.array([JPEG] * 77)})
    for name, said in (("more", 78), ("fewer", 76)):
        data = lie(table, 77, said)
        folder.write(f"{name}.parquet", data)
        rows = folder.rows(input=str(folder.input / f"{name}.parquet"), output=str(folder.output / name))
        assert 70 <= len([row for row in rows if row.data == JPEG]) <= 77
        assert rows[-1].rejected is not None
        assert rows[-1].rejected.reason == "corrupt_archive"


def lie(table: pa.Table, rows: int, said: int) -> bytes:
    """A file whose row group has another number of rows in the footer. Thrift's zigzag varints of both have a byte."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none", use_dictionary=False, write_statistics=False, store_schema=False)
    data = buffer.getvalue()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    old, new = (
        bytes([0x16, 0x80 | rows * 2 & 0x7F, rows * 2 >> 7]),
        bytes([0x16, 0x80 | said * 2 & 0x7F, said * 2 >> 7]),
    )
    position = data.rindex(old, start)
    return data[:position] + new + data[position + len(old) :]


@pytest.mark.parametrize("column", ["image", "n", "url"])
def test_a_footer_that_contradicts_itself_does_not_end_the_process(folder: Folder, column: str) -> None:
    """pyarrow ends the process for such a file where it gives the metadata of a column: the schema says that the column
    has no nulls, its statistics of levels say that it may have.
    """
    table = pa.table(
        {"n": range(300), "url": ["http://h"] * 300, **({} if column == "url" else {"image": [JPEG] * 300})}
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=100)
    name = column.encode()
    old, new = (bytes([0x25, level, 0x18, len(name)]) + name for level in (2, 0))
    assert buffer.getvalue().count(old) == 1
    folder.write("a.parquet", buffer.getvalue().replace(old, new))
    folder.write("b.jpg", JPEG)
    rows = folder.rows(parquet={} if column == "url" else {"columns": ["n"]})
    expected = [("a.parquet", "corrupt_archive"), ("b.jpg", None)]
    assert outcomes(rows)[-2:] == (expected[1:] if column == "url" else expected)


def test_statistics_are_read_as_pyarrow_reads_them(folder: Folder) -> None:
    columns = {
        "image": [JPEG] * 6, "a": [1, -5, None, None, 7, 2**60], "b": pa.array([2**64 - 1, 0] * 3, pa.uint64()),
        "c": ["ü", "a", None, None, "b", "c"], "d": [[1]] * 6, "e": pa.nulls(6, pa.int64()),
    }  # fmt: skip
    path = write(folder, pa.table(columns), row_group_size=2)
    metadata = pq.read_metadata(path)
    entry = LocalStore().stat(str(path))
    assert entry is not None
    for number, name in enumerate(columns):
        with StoreFile(LocalStore(), entry) as file:
            found = read_bounds(file, entry.size, number)
        assert found is not None
        for group, bounds in enumerate(found):
            theirs = metadata.row_group(group).column(number).statistics
            assert (bounds.low is not None) == theirs.has_min_max
            if name in "ab" and bounds.low is not None and bounds.high is not None:
                ours = [int.from_bytes(value, "little", signed=name == "a") for value in (bounds.low, bounds.high)]
                assert ours == [theirs.min, theirs.max]
            elif name == "c" and bounds.low is not None and bounds.high is not None:
                assert [bounds.low.decode(), bounds.high.decode()] == [theirs.min, theirs.max]


KEYS: dict[str, tuple[pa.Array, list[str]]] = {
    "floats": (pa.array([1.5, float("nan"), None]), ["1.5", "nan", "2"]),
    "bytes": (pa.array([b"abc", b"\xff", None]), ["abc", "ff", "2"]),
    "times": (pa.array([1, 1_600_000_000_000_000_001, None], pa.timestamp("ns")), []),
    "far times": (pa.array([2**50, -(2**50), None], pa.timestamp("ms")), []),
    "dates": (pa.array([datetime.date(2024, 1, 2)] * 2 + [None]), ["2024-01-02", "2024-01-02", "2"]),
    "dictionary": (pa.array(["a", "a", None]).dictionary_encode(), ["a", "a", "2"]),
    "text not in UTF-8": (
        pa.Array.from_buffers(pa.string(), 3, pa.array([b"a\xff", b"b", b""]).buffers()),
        ["a\ufffd", "b", ""],
    ),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_any_type(folder: Folder, name: str) -> None:
    values, expected = KEYS[name]
    write(folder, pa.table({"image": [JPEG] * 3, "id": values}))
    rows = folder.rows(parquet={"key_column": "id"})
    assert [row.data for row in rows] == [JPEG] * 3
    assert not expected or [row.key for row in rows] == expected
    for row in rows:
        row.key.encode()


def test_a_nested_key_is_refused(folder: Folder) -> None:
    path = write(folder, pa.table({"image": [JPEG], "id": [[1]]}))
    with pytest.raises(ConfigError, match=rf"parquet\.key_column: 'id' of {path} is list<.*expected text or a number"):
        folder.plan(parquet={"key_column": "id"})


def test_a_passed_value_that_is_broken_rejects_its_row_only(folder: Folder) -> None:
    texts = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"b\xff", b"c"]).buffers())
    write(folder, pa.table({"image": [JPEG] * 3, "text": texts}))
    rows = folder.rows(parquet={"columns": ["text"]})
    assert outcomes(rows) == [("0", None), ("1", "unreadable"), ("2", None)]
    assert [row.columns["text"][0].as_py() for row in rows if "text" in row.columns] == ["a", "c"]


def test_two_passed_columns_of_one_name_are_a_reject_of_the_file(folder: Folder) -> None:
    write(folder, pa.table({"image": [JPEG], "n": [1]}))
    write(folder, pa.Table.from_arrays([GOOD, GOOD, GOOD], ["image", "n", "n"]), "b.parquet")
    rows = folder.rows(parquet={"columns": ["n"]})
    assert outcomes(rows) == [("0", None), ("b.parquet", "corrupt_archive")]


@pytest.mark.slow
def test_a_large_parquet_file(folder: Folder) -> None:
    noise = np.random.default_rng(0)
    images = [noise.integers(0, 256, size, np.uint8).tobytes() for size in (30 << 20, 1, 50 << 20, 9 << 20, 20 << 20)]
    write(folder, pa.table({"image": images, "id": [str(n) for n in range(5)]}), "big.parquet")
    rows = folder.rows()
    assert [row.rejected for row in rows] == [None] * 5
    assert [row.data for row in rows] == images


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"key_column": "id"}, r"parquet\.key_column: .*a\.parquet has no column 'id'; it has image, n, deep"),
        ({"image_column": "n"}, r"parquet\.image_column: 'n' of .*a\.parquet is int64: expected binary"),
        ({"image_column": "deep"}, r"'deep' of .* is struct<x: int64>: expected binary"),
        ({"image_column": "deep.y"}, r"has no column 'deep.y'"),
        ({"columns": ["colour"]}, "no Parquet input has a column 'colour'"),
    ],
)
def test_columns_that_are_not_there_or_of_no_use_are_refused(folder: Folder, keys: Any, message: str) -> None:
    pq.write_table(pa.table({"image": [JPEG], "n": [1], "deep": [{"x": 1}]}), folder.input / "a.parquet")
    with pytest.raises(ConfigError, match=message):
        folder.plan(parquet=keys)


def test_a_planned_file_stays_in_its_column_when_another_is_configured_later(folder: Folder) -> None:
    write(folder, pa.table({"image": [JPEG], "mask": [OTHER]}))
    assert [row.data for row in folder.rows()] == [JPEG]
    write(folder, pa.table({"image": [JPEG], "mask": [OTHER]}), "b.parquet")
    folder.keys["parquet"] = {"image_column": "mask"}
    assert [row.data for row in folder.rows()] == [JPEG, OTHER]
    assert folder.plan().notes == [
        "Parquet files of earlier runs are read from column image as planned, new ones from mask "
        "(parquet.image_column): give a new output to read all from mask"
    ]
