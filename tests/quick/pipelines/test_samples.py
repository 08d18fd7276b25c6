"""Samples of tars: which members are one sample, keys, and metadata that are JSON and belong to their image."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.inputs import samples
from pipelines.inputs.rows import fold_suffixes
from pipelines.inputs.samples import encode_metadata, split_name
from tests.support.tars import make_tar, read_tar

PHOTO = b"photo"


def read_names(path: Path, names: list[str], contents: dict[str, bytes] | None = None) -> tuple[dict[str, Any], Any]:
    """Return the metadata of each row by its key, and what was skipped. A metadata file holds its own name as JSON."""
    texts = {name: json.dumps(name).encode() for name in names} | (contents or {})
    data = [(name, PHOTO if name.lower().endswith(("jpg", "jpeg", "png")) else texts[name]) for name in names]
    rows, skipped = read_tar(path, make_tar(data))
    found = {row.key: json.loads(row.metadata) if row.metadata else None for row in rows}
    assert len(found) == len(rows), "keys are unique"
    return found, dict(skipped.counts)


def test_members_with_one_name_are_a_sample(tmp_path: Path) -> None:
    names = ["0001.jpg", "0001.json", "0001.cls", "0002.TXT", "0002.JPEG", "d.1/0003.left.jpg", "d.1/0003.right.jpg"]
    names += ["d.1/._0003.jpg", "d.1/0003.meta.json", "0004.json", "0005.png", ".hidden.jpg"]
    found, skipped = read_names(tmp_path / "a.tar", names, {"0001.cls": b" 7\n", "0002.TXT": b"\xef\xbb\xbfa text"})
    assert found == {
        "0001": {"json": "0001.json", "cls": 7},
        "0002": {"txt": "a text"},
        "d.1/0003.left.jpg": {"meta.json": "d.1/0003.meta.json"},
        "d.1/0003.right.jpg": {"meta.json": "d.1/0003.meta.json"},
        "0005": None,
        ".hidden": None,
    }
    assert skipped == {"hidden files": 1, "metadata files without an image": 1}


def test_shadows_of_macos_do_not_part_a_sample(tmp_path: Path) -> None:
    names = ["._1.jpg", "1.jpg", "._1.json", "1.json", "d/._2.left.jpg", "d/2.left.jpg", "d/2.right.jpg", "d/2.txt"]
    found, skipped = read_names(tmp_path / "a.tar", names, {"d/2.txt": b"t"})
    assert found == {"1": {"json": "1.json"}, "d/2.left.jpg": {"txt": "t"}, "d/2.right.jpg": {"txt": "t"}}
    assert skipped == {"hidden files": 3}


def test_members_that_are_no_images_are_counted(tmp_path: Path) -> None:
    names = ["a.jpg", "a.json", "b.jxl", "c.JXL", "d.mp4", "e.avif", "f", "._g.jpg", ".hidden", "h.jsonl"]
    rows, skipped = read_tar(tmp_path / "a.tar", make_tar([(name, b"1") for name in names]))
    assert [row.key for row in rows] == ["a", "e"]
    kinds = {".jxl files": 2, ".mp4 files": 1, "files without an extension": 2, "hidden files": 1, ".jsonl files": 1}
    assert skipped.counts == kinds


@pytest.mark.parametrize("count", [1, 2, 5, 300, 1000])
def test_a_date_with_dots_is_part_of_the_name(tmp_path: Path, count: int) -> None:
    """All have one name up to the first dot. Each image has its own metadata, and the tar does not multiply them."""
    names = [f"2024.05.{n:06}.{suffix}" for n in range(count) for suffix in ("cls", "jpg", "json")]
    found, skipped = read_names(tmp_path / "a.tar", [*names, "2024.05.999999.json"])
    assert found == {
        f"2024.05.{n:06}.jpg": {"cls": f'"2024.05.{n:06}.cls"', "json": f"2024.05.{n:06}.json"} for n in range(count)
    }
    assert skipped == {"metadata files without an image": 1}


def test_a_domain_with_dots_in_many_names_is_found_out(tmp_path: Path) -> None:
    names = [f"www.example.com_{n:04}.{suffix}" for n in range(600) for suffix in ("jpg", "json")]
    found, skipped = read_names(tmp_path / "a.tar", names)
    assert found == {f"www.example.com_{n:04}.jpg": {"json": f"www.example.com_{n:04}.json"} for n in range(600)}
    assert skipped == {}


@pytest.mark.parametrize(
    ("names", "found"),
    [
        # Several captions, several views, tiles and frames: sensible archives of today keep their keys and metadata.
        (["1.jpg", "1.0.txt", "1.1.txt"], {"1": {"0.txt": '"1.0.txt"', "1.txt": '"1.1.txt"'}}),
        (["1.0.jpg", "1.1.jpg", "1.json"], {"1.0.jpg": {"json": "1.json"}, "1.1.jpg": {"json": "1.json"}}),
        (["1.0.0.png", "1.0.1.png", "1.json"], {"1.0.0.png": {"json": "1.json"}, "1.0.1.png": {"json": "1.json"}}),
        (
            ["1.jpg", "1.seg.png", "1.seg.json"],
            {"1.jpg": {"seg.json": "1.seg.json"}, "1.seg.png": {"seg.json": "1.seg.json"}},
        ),
        (["1.a.jpg", "1.meta.json"], {"1": {"meta.json": "1.meta.json"}}),
        (["22.05.png", "22.06.png"], {"22.05.png": None, "22.06.png": None}),
        (["1.0.jpg", "1.0.json", "1.json"], {"1": {"0.json": "1.0.json", "json": "1.json"}}),
        (["1.0.jpg", "1.0.json", "1.1.jpg"], {"1.0.jpg": {"json": "1.0.json"}, "1.1.jpg": None}),
        (
            ["2024.5.1.jpg", "2023.1.1.jpg", "2024.6.1.jpg"],
            {f"{d}.1.jpg": None for d in ("2024.5", "2023.1", "2024.6")},
        ),
        (["v1.0\\1.jpg", "v1.0\\2.jpg"], {"v1.0\\1": None, "v1.0\\2": None}),
    ],
)
def test_what_is_between_two_dots(tmp_path: Path, names: list[str], found: dict[str, Any]) -> None:
    assert read_names(tmp_path / "a.tar", names) == (found, {})


def test_a_sample_of_many_frames_is_read_in_parts_and_shares_what_came_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [f"clip.{n:03}.jpg" for n in range(9)]
    monkeypatch.setattr(samples, "SAMPLE_IMAGES", 4)
    found, skipped = read_names(tmp_path / "a.tar", ["clip.json", *frames])
    assert (found, skipped) == ({frame: {"json": "clip.json"} for frame in frames}, {})
    found, skipped = read_names(tmp_path / "a.tar", [*frames, "clip.json"])
    assert found == {frame: {"json": "clip.json"} if frame == frames[-1] else None for frame in frames}
    monkeypatch.setattr(samples, "SAMPLE_BYTES", 2 * len(PHOTO))
    monkeypatch.setattr(samples, "SAMPLE_IMAGES", 256)
    assert list(read_names(tmp_path / "a.tar", frames)[0]) == frames


def test_metadata_that_would_be_multiplied_are_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "METADATA_BYTES", 3000)
    names = ["1.json", *(f"1.{n}.jpg" for n in range(9)), "2.jpg", "2.json", "3.jpg", "3.json", "3.txt", "3.cls"]
    large = json.dumps("x" * 1000).encode()
    found, skipped = read_names(tmp_path / "a.tar", names, {"1.json": large, "2.json": large, "3.json": b"1" * 3001})
    assert [found["1.0.jpg"], found["2"], found["3"]] == [
        None,
        {"json": "x" * 1000},
        {"txt": '"3.txt"', "cls": '"3.cls"'},
    ]
    assert skipped == {"metadata files over 8 MiB in their sample": 2}
    names = ["1.0.txt", "1.jpg", "1.JPG", "1.Jpg", "1.jPg", "1.png"]
    found, skipped = read_names(tmp_path / "a.tar", names, {"1.0.txt": b"x" * 1000})
    assert (list(found), set(found.values())) == (names[1:], {None})
    assert skipped == {"metadata files over 8 MiB in their sample": 1}


def test_an_image_over_the_cap_does_not_part_its_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "SAMPLE_BYTES", 2000)
    data = make_tar([("1.left.jpg", PHOTO), ("1.right.jpg", bytes(5000)), ("1.json", b"1")])
    rows, _ = read_tar(tmp_path / "a.tar", data, max_bytes=1000)
    assert [row.metadata for row in rows] == ['{"json": 1}'] * 2


def test_metadata_too_large_for_a_part_of_a_sample_are_dropped_for_all_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "METADATA_BYTES", 3000)
    monkeypatch.setattr(samples, "SAMPLE_IMAGES", 4)
    frames = [f"clip.{n:03}.jpg" for n in range(9)]
    large = {"clip.json": json.dumps("x" * 1000).encode()}
    found, skipped = read_names(tmp_path / "a.tar", ["clip.json", *frames], large)
    assert (found, skipped) == (dict.fromkeys(frames), {"metadata files over 8 MiB in their sample": 1})


def test_metadata_that_would_be_multiplied_belong_to_the_image_of_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "METADATA_BYTES", 8000)
    names = [f"www.a_{n}.{suffix}" for n in range(9) for suffix in ("jpg", "json")]
    found, skipped = read_names(tmp_path / "a.tar", names)
    assert (found, skipped) == ({f"www.a_{n}.jpg": {"json": f"www.a_{n}.json"} for n in range(9)}, {})


DEEP = b"[" * 100_000
ODD_JSON: list[tuple[str, bytes, Any]] = [
    (
        "nan",
        b'{"a": NaN, "b": [Infinity, -Infinity], "c": 1.5}',
        {"a": "NaN", "b": ["Infinity", "-Infinity"], "c": 1.5},
    ),
    ("overflow", b'{"a": 1e999, "b": -1e999}', {"a": "1e999", "b": "-1e999"}),
    ("huge integer", b'{"a": ' + b"7" * 5000 + b"}", {"a": "7" * 5000}),
    ("large integer", b'{"a": 12345678901234567890123}', {"a": 12345678901234567890123}),
    ("key twice", b'{"a": 1, "a": 2}', '{"a": 1, "a": 2}'),
    ("half a pair", b'{"a": "\\ud800x", "\\udfff": 1}', {"a": "\ufffdx", "\ufffd": 1}),
    ("pair", b'"\\ud83d\\ude00"', "\U0001f600"),
    ("deep", DEEP, DEEP.decode()),
    ("deep and whole", b"[" * 500 + b"]" * 500, "[" * 500 + "]" * 500),
    ("many brackets", b"[" + b"[1]," * 500 + b'"["]', [[1]] * 500 + ["["]),
    ("not UTF-8", b'{"a": "\xff"}', {"a": "\ufffd"}),
    ("byte order mark", b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
    ("UTF-16", '{"a": "é"}'.encode("utf-16"), {"a": "é"}),
    ("nul", b'"a\\u0000b"', "a\0b"),
    ("lines", b'{"a": 1}\n{"a": 2}\n', '{"a": 1}\n{"a": 2}\n'),
    ("comment", b'{"a": 1} // one', '{"a": 1} // one'),
    ("empty", b"", ""),
    ("scalar", b"null", None),
    ("python", b"{'a': None}", "{'a': None}"),
]


@pytest.mark.parametrize(("data", "value"), [case[1:] for case in ODD_JSON], ids=[case[0] for case in ODD_JSON])
def test_metadata_are_json_for_every_reader_and_say_what_stood_there(data: bytes, value: Any) -> None:
    text = '{"json": ' + encode_metadata("json", data) + "}"
    text.encode()
    assert json.loads(text, parse_constant=refuse)["json"] == value
    assert duckdb.sql("select json_valid($1)", params=[text]).fetchall() == [(True,)]


def refuse(constant: str) -> None:
    raise AssertionError(constant)


TOKENS = st.sampled_from(
    [*'{}[]:,"\\', "NaN", "-Infinity", "1e999", "-0", '"a":', "\\ud83d", "\\u0000", "null", "\ufeff", "7"]
)


@given(st.binary(max_size=40) | st.lists(TOKENS, max_size=20).map(lambda tokens: "".join(tokens).encode()))
def test_any_bytes_become_json(data: bytes) -> None:
    for suffix in ("json", "txt", "cls"):
        text = encode_metadata(suffix, data)
        text.encode()
        json.loads(text, parse_constant=refuse)
    duckdb_says = duckdb.execute("select json_valid($1)", [encode_metadata("json", data)]).fetchall()
    assert duckdb_says == [(True,)]


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"7", 7),
        (b" -3\r\n", -3),
        (b"007", 7),
        (b"1_0", "1_0"),
        ("²".encode(), "²"),
        (b"9" * 5000, "9" * 5000),
        (b"", ""),
    ],
)
def test_a_class_is_an_integer_or_the_text(data: bytes, value: Any) -> None:
    assert json.loads(encode_metadata("cls", data)) == value
    assert json.loads(encode_metadata("txt", data)) == data.decode()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b.c/1.Left.JPG", ("a/b.c/1", "left.jpg")),
        ("..jpg", ("..jpg", "")),
        (".a.jpg", (".a", "jpg")),
        ("", ("", "")),
        ("a/", ("a/", "")),
    ],
)
def test_names_are_split_at_the_first_dot_of_the_file_name(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


def test_the_counts_of_skipped_members_are_few_however_many_suffixes_there_are(tmp_path: Path) -> None:
    """Names that end with a number after a dot have each a suffix of their own."""
    names = [*(f"a.{n}" for n in range(3000)), "b.1", f"c.{'x' * 5000}"]
    _, skipped = read_tar(tmp_path / "a.tar", make_tar([(name, b"") for name in names]))
    assert skipped.counts.total() == 3002
    assert len(skipped.counts) <= 101
    assert (skipped.counts[".1 files"], skipped.counts["files with other suffixes"]) == (2, 2901)
    assert max(map(len, skipped.counts)) < 30


def test_the_counts_of_many_tars_are_few() -> None:
    counts = Counter({f".{n} files": n + 1 for n in range(5000)} | {"hidden files": 1, "files with other suffixes": 7})
    folded = fold_suffixes(counts)
    assert sum(folded.values()) == counts.total()
    assert len(folded) <= 102
    assert (folded[".4999 files"], folded["hidden files"]) == (5000, 1)
