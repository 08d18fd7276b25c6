"""Lists of images: every row is a row of the output, and what cannot be read as it stands is refused by line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.inputs import images
from pipelines.inputs.lists import SUFFIXES, resolve
from pipelines.inputs.rows import Input
from storage.local import LocalStore
from storage.schemes import SCHEMES
from storage.settings import ConfigError
from tests.support.images import encode, make_rgb
from tests.support.input_folder import Folder, outcomes

JPEG = encode(make_rgb(), "JPEG")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    found = Folder(tmp_path)
    for name in ("a", "b", "c"):
        found.write(f"{name}.jpg", JPEG + name.encode())
    return found


def rows_of(folder: Folder, name: str, text: str | bytes, **keys: Any) -> list[tuple[str, Any]]:
    """The key and the metadata of each row of a list."""
    path = folder.write(name, text if isinstance(text, bytes) else text.encode())
    return [(row.key, row.metadata and json.loads(row.metadata)) for row in folder.rows(input=str(path), **keys)]


@pytest.mark.parametrize("suffix", ["txt", "csv"])
def test_lists_of_uris(folder: Folder, suffix: str) -> None:
    folder.write("images/a 1.jpg", JPEG)
    folder.write("images/b#2.jpg", JPEG)
    uris = ["images/a 1.jpg", str(folder.input / "images/b#2.jpg"), "images/gone.jpg", "ftp://host/x.jpg"]
    path = folder.input / f"list.{suffix}"
    if suffix == "csv":
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["id", "url"], *([n, uri] for n, uri in enumerate(uris))])
    else:
        path.write_text("\n".join(["# a comment", *uris, ""]))
    rows = folder.rows(input=str(path))
    assert outcomes(rows) == list(zip(uris, [None, None, "missing", "unreadable"], strict=True))
    assert rows[0].metadata == ('{"id": "0"}' if suffix == "csv" else None)
    if suffix == "txt":
        path.write_text("\n".join([*uris, "images/c.jpg"]))
        assert folder.plan(input=str(path)).inputs == 1


@pytest.mark.parametrize(
    ("before", "after", "new"),
    [
        ("a.jpg,1\na.jpg,2\n", "a.jpg,1\na.jpg,2\n", []),
        ("a.jpg,1\na.jpg,2\n", "b.jpg,0\na.jpg,0\na.jpg,1\na.jpg,2\na.jpg,3\n", ["b0", "a0", "a3"]),
        ("a.jpg,1\na.jpg,1\n", "a.jpg,1\na.jpg,1\na.jpg,1\n", ["a1"]),
        ("a.jpg,1\nb.jpg,1\n", "b.jpg,1\n", []),
    ],
)
def test_a_grown_list_gives_exactly_its_new_rows(folder: Folder, before: str, after: str, new: list[str]) -> None:
    """Also if new rows stand before old ones, and if rows are equal: 5 equal rows of which 3 are planned are 2 new."""
    first = rows_of(folder, "a.csv", "path,caption\n" + before)
    assert len(first) == before.count("\n")
    rows = rows_of(folder, "a.csv", "path,caption\n" + after)[len(first) :]
    assert [key[0] + metadata["caption"] for key, metadata in rows] == new


def test_lists_and_folders_that_name_the_same_image(folder: Folder) -> None:
    captions = folder.write("captions.csv", b"path,caption\na.jpg,one\na.jpg,two\n")
    names = folder.write("names.txt", b"a.jpg\nb.jpg\n")
    inputs = [str(folder.input), str(captions), str(names), str(captions)]
    assert [row.key for row in folder.rows(input=inputs)] == ["a.jpg"] * 3 + ["b.jpg", "c.jpg"]
    assert folder.plan(input=inputs).inputs == 0
    assert folder.plan(input=[str(folder.input)]).inputs == 0
    folder.write("d.jpg", JPEG)
    assert folder.plan(input=[str(folder.input)]).inputs == 1
    assert folder.plan(input=[str(folder.write("e.txt", b"d.jpg\n"))]).inputs == 0  # says no more than the folder
    assert folder.plan(input=[str(folder.write("e.csv", b"path,n\nd.jpg,1\n"))]).inputs == 1


def test_many_rows_of_one_image_are_planned_in_bounded_files(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.planning.packing.SEGMENT_SHARDS", 3)
    monkeypatch.setattr("pipelines.planning.packing.SHARD_METADATA", 300)
    path = folder.write("a.csv", b"path,n\n" + b"a.jpg,%s\n" % (b"x" * 100) * 40)
    report = folder.plan(input=str(path))
    assert (report.inputs, report.rows, report.shards) == (40, 40, 14)
    plans = sorted((folder.output / "plan").iterdir())
    assert len(plans) == 5
    assert len(folder.rows(input=str(path))) == 40
    plans[-1].unlink()  # as if a run had ended between two files
    assert folder.plan(input=str(path)).inputs == 4
    assert len(folder.rows(input=str(path))) == 40


def test_an_image_that_rows_share_is_fetched_once(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def read(store: LocalStore, uri: str, *rest: Any) -> bytes:
        fetched.append(uri.rpartition("/")[2])
        return original(store, uri, *rest)

    original = LocalStore.read
    path = folder.write("a.csv", "\n".join(["path,n", *(f"{'ab'[n % 2]}.jpg,{n}" for n in range(200))]).encode())
    folder.plan(input=str(path))
    monkeypatch.setattr(LocalStore, "read", read)
    monkeypatch.setattr(images, "_AHEAD", 4)
    rows = folder.rows(input=str(path))
    assert [row.data for row in rows] == [JPEG + b"a", JPEG + b"b"] * 100
    assert len({id(row.data) for row in rows}) < 10
    assert len([name for name in fetched if name in ("a.jpg", "b.jpg")]) < 10


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", "path,caption\na.jpg,one\na.jpg,two\na.jpg,one\n", [("a.jpg", c) for c in ("one", "two", "one")]),
        ("a.csv", "path;caption\r\na.jpg;x, y\r\n", [("a.jpg", "x, y")]),
        ("a.csv", "path|caption\na.jpg|x;y\n", [("a.jpg", "x;y")]),
        ("a.csv", "path\tcaption\na.jpg\tx\n", [("a.jpg", "x")]),
        ("a.tsv", "path\tcaption\na.jpg\tx, y;z\n", [("a.jpg", "x, y;z")]),
        ("A.CSV", "\ufeffFilePath,caption\na.jpg,x\n", [("a.jpg", "x")]),
        ("a.csv", "caption,File Name\rx,a.jpg\ry,b.jpg\r", [("a.jpg", "x"), ("b.jpg", "y")]),
        ("a.csv", 'caption,image_path\n"two\nlines, and ""quotes""",a.jpg\n', [("a.jpg", 'two\nlines, and "quotes"')]),
        ("a.csv", f"path,caption\na.jpg,{'x' * 200_000}\n", [("a.jpg", "x" * 200_000)]),
        ("a.csv", "path,caption\n\na.jpg,x\n,,\n".replace(",,", ","), [("a.jpg", "x")]),
        ("a.csv", ",url,image,caption\n0,http://h/1,a.jpg,no\n", [("a.jpg", "no")]),
        ("a.csv", "path,caption\na.jpg,1.10\nb.jpg,NA\nc.jpg, 007\n", [("a", "1.10"), ("b", "NA"), ("c", " 007")]),
        ("a.csv", "path,caption\na.jpg,x\u2028y\x0bz\x85w\n", [("a.jpg", "x\u2028y\x0bz\x85w")]),
        ("a.csv", "image_name| comment_number|caption\na.jpg| 0|x, y\n", [("a", "x, y")]),
        ("a.csv", "filepaths,labels,caption\na.jpg,1,x\n", [("a", "x")]),
        ("a.csv", "filename,image,caption\nno,a.jpg,x\n", [("a", "x")]),
        ("metadata.jsonl", '{"file_name": "a.jpg", "caption": {"bbox": [1, 2]}}', [("a", {"bbox": [1, 2]})]),
        ("a.jsonl", '{"caption": "x", "path": "a.jpg"}\n\n{"path": "b.jpg", "caption": [1, 0.5, null]}',
         [("a", "x"), ("b", [1, 0.5, None])]),
        ("a.ndjson", '{"image": "a.jpg", "caption": "\\ud800"}', [("a.jpg", "\ud800")]),
    ],
)  # fmt: skip
def test_rows_are_as_they_stand(folder: Folder, name: str, text: str, expected: list[tuple[str, Any]]) -> None:
    rows = rows_of(folder, name, text)
    assert [(key.removesuffix(".jpg"), metadata["caption"]) for key, metadata in rows] == [
        (key.removesuffix(".jpg"), caption) for key, caption in expected
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", b'path,caption\na.jpg,"oops\nb.jpg,fine\nc.jpg,fine\n', "line 2 is no valid row: .*not closed"),
        ("a.csv", b'path,caption\na.jpg,x\nb.jpg,"o"ops\n', "line 3 is no valid row"),
        ("a.csv", b'path,caption\na.jpg,"x \\"y\\" z"\n', "line 2 is no valid row"),
        ("a.csv", b"path,caption\na.jpg,x\nb.jpg,x, y\n", "line 3 has 3 fields, the header has 2"),
        ("a.csv", b"path,caption\na.jpg\n", "line 2 has 1 fields, the header has 2"),
        ("a.csv", b"a.jpg,x\nb.jpg,y\n", "line 1 is no header .*add a header line.*a.jpg,x"),
        ("a.csv", b"", "is empty: add a header line with a column"),
        ("a.csv", b"\x0b\npath\na.jpg\n", "line 1 is no header"),
        ("a.jsonl", b'\x0b\n{"path": "a.jpg"}\n', "line 1 is not JSON"),
        ("a.csv", b"path,caption,caption\na.jpg,x,y\n", "two columns 'caption'"),
        ("a.csv", b"image_name| comment_number| comment\na.jpg| 0| x\nb.jpg| 4 y\n", "line 3 has 2 fields"),
        ("a.csv", b"path,path\na.jpg,b.jpg\n", "set lists.column"),
        ("a.csv", b"image_url,image_path\nx,a.jpg\n", "the columns 'image_path' and 'image_url': set lists.column"),
        ("a.csv", "path,caption\na.jpg,x\n".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("a.csv", "path,caption\na.jpg,x\n".encode("utf-16-le"), "line 1 has a NUL"),
        ("a.csv", b"path,caption\na.jpg,\xe9\n", "is not UTF-8"),
        ("a.csv", b"path,caption\na.jpg,x\0y\n", "line 2 has a NUL"),
        ("a.csv", b'path\n"data:image/png;base64,AAAA"\n', "line 2 has the image itself"),
        ("a.tsv", b'path\tcaption\na.jpg\t"x\nb.jpg\ty"\n', "line 2 has a quote that is not closed in the same line"),
        ("a.tsv", b"path,caption\na.jpg,x\n", "no header"),
        ("a.txt", b"a.jpg\tx\n", "line 1 has a tab"),
        ("a.txt", b"\xff\xfea\0", "is UTF-16"),
        ("a.txt", b"a.jpg\nHTTP://h/1.jpg\n", r"line 2 is an http.s. URL, .* set fetch\.enabled: true"),
        ("a.jsonl", b'{"path": "a.jpg"}\n{"path": 7}\n', "line 2 has no string as 'path'"),
        ("a.jsonl", b'{"path": "a.jpg"}\n{"uri": "b.jpg"}\n', "line 2 has the URI as 'uri', earlier lines as 'path'"),
        ("a.jsonl", b'{"path": "a.jpg"}\n{"id": 7}\n', "line 2 has no string as 'path'"),
        ("a.jsonl", b'{"path": "a.jpg"}\n{"path": "a.jpg", "image": "b.jpg"}\n', "line 2 has the URI as 'image'"),
        ("a.jsonl", b'{"path": "a.jpg", "image": "b.jpg"}\n{"path": "a.jpg"}\n', "line 2 has the URI as 'path'"),
        ("a.jsonl", b'{"path": "a.jpg"}\n{"path": "a.jpg", "url": "b"}\n', "line 2 has the columns 'path' and 'url'"),
        ("a.jsonl", b'{"path": "a.jpg", "x": ' + b"[" * 990 + b"]" * 990 + b"}\n", "line 1 is (not JSON|nested)"),
        ("a.csv", b"path,caption,\na.jpg,x,\nb.jpg,y,lost\n", "line 3 has 'lost' in column 3, which has no name"),
        ("a.csv", b"path,caption, caption\na.jpg,x,y\n", "two columns 'caption'"),
        ("a.jsonl", b'{"path": "a.jpg", "x": NaN}\n', "line 1 is not JSON"),
        ("a.jsonl", b'{"path": "a.jpg", "x": 1e999}\n', "line 1 is not JSON"),
        ("a.jsonl", b'{"path": "a.jpg", "x": 1, "x": 2}\n', "line 1 is not JSON: a key occurs twice"),
        ("a.jsonl", b'[{"path": "a.jpg"}]\n', "line 1 is not a JSON object"),
        ("a.jsonl", b'{"path": "a\\ud800.jpg"}\n', "half of a surrogate pair"),
        ("a.jsonl", b'{"path": ' + b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'{"id": 1}\n', "line 1 has no key for an image's URI"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_as_it_stands_is_refused_by_line(
    folder: Folder, name: str, text: bytes, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*{message}") as refused:
        rows_of(folder, name, text)
    assert "\n" not in str(refused.value)


def test_a_line_without_end_is_refused_with_little_memory(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.inputs.lists._LINE_CHARS", 1000)
    for name in ("a.txt", "a.csv", "a.jsonl"):
        with pytest.raises(ConfigError, match=f"{name} line 1 has over 1,000 characters"):
            rows_of(folder, name, "path" * 1000)


def test_a_row_without_uri_is_a_reject_that_names_its_line(folder: Folder) -> None:
    path = folder.write("a.csv", b'path,caption\na.jpg,x\n,y\n"  ",z\n,\n')
    rows = folder.rows(input=str(path))
    assert outcomes(rows) == [
        ("a.jpg", None),
        (f"{path} line 3", "missing"),
        (f"{path} line 4", "missing"),
    ]
    assert folder.plan(input=str(path)).skipped.counts == {"empty rows of lists": 1}


def test_a_line_of_a_text_list_is_one_uri(folder: Folder) -> None:
    """Also with commas, spaces and quotes, for which lists that are read as CSV break."""
    names = ["fill/w_303,h_170,q_90.jpg", 'a "b", c.jpg', "x?crop=1,2&width=80.jpg", "'y'.jpg"]
    for name in names:
        folder.write(name, JPEG)
    path = folder.write("l.txt", "\n".join(names).encode())
    assert outcomes(folder.rows(input=str(path))) == [(name, None) for name in names]


def test_comments_that_look_like_images_are_counted(folder: Folder) -> None:
    folder.write("#1.jpg", JPEG)
    path = folder.write("a.txt", b"# prose\n#1.jpg\n./#1.jpg\n  \na.jpg\r\n")
    assert folder.plan(input=str(path)).skipped.counts == {"comments in lists that end like an image's name": 1}
    assert outcomes(folder.rows(input=str(path))) == [("./#1.jpg", None), ("a.jpg", None)]


@pytest.mark.parametrize(
    ("name", "before", "after", "new"),
    [
        ("a.csv", "path,n,caption\na.jpg,1,x\n", "path,caption,n\na.jpg,x,1\n", 0),
        ("a.csv", "path,n,caption\na.jpg,1,x\n", "caption;Path; n \nx;a.jpg;1\n", 0),
        ("a.csv", "path,n,m\na.jpg,1,2\n", "path,n,m\na.jpg,2,1\n", 1),
        ("a.jsonl", '{"path": "a.jpg", "n": 1, "m": {"x": 1, "y": [{"p": 0, "q": 1}]}}',
         '{"m": {"y": [{"q": 1, "p": 0}], "x": 1}, "path": "a.jpg", "n": 1}', 0),
        ("a.jsonl", '{"path": "a.jpg", "m": {"x": 1, "y": 2}}', '{"path": "a.jpg", "m": {"x": 2, "y": 1}}', 1),
        ("a.jsonl", '{"path": "a.jpg", "n": 1, "m": [2e3]}', '{"path": "a.jpg", "n": 1.0, "m": [2000]}', 0),
        ("a.jsonl", '{"path": "a.jpg", "n": 1}', '{"path": "a.jpg", "n": 1.5}', 1),
        ("a.jsonl", '{"path": "a.jpg", "n": 1}', '{"path": "a.jpg", "n": "1"}', 1),
        ("a.jsonl", '{"path": "a.jpg", "n": 9007199254740993}', '{"path": "a.jpg", "n": 9007199254740992}', 1),
        ("a.jsonl", '{"path": "a.jpg", "m": [1, 2]}', '{"path": "a.jpg", "m": [2, 1]}', 1),
        ("a.csv", ",path,n\n0,a.jpg,1\n1,b.jpg,1\n", ",path,n\n0,c.jpg,1\n1,a.jpg,1\n2,b.jpg,1\n", 1),
        ("a.csv", ",path\n0,a.jpg\n", ",path\n5,a.jpg\n", 0),
        ("a.csv", ",path\n0,a.jpg\n", ",path\n5,a.jpg\n6,a.jpg\n", 1),
    ],
)  # fmt: skip
def test_rows_are_compared_without_the_order_of_their_columns(
    folder: Folder, name: str, before: str, after: str, new: int
) -> None:
    folder.plan(input=str(folder.write(name, before.encode())))
    assert folder.plan(input=str(folder.write(name, after.encode()))).inputs == new


def test_rows_are_known_in_plans_that_were_made_before() -> None:
    """Metadata stands in such plans in the order of the list, with names as they stood, and without pandas' index."""
    earlier = [None, '{" n": "1", "m": {"b": 1, "a": "\u00e9"}}', '{"x": "\\ud800"}']
    now = ['{"": "0"}', '{"m": {"a": "\\u00e9", "b": 1}, "n": "1", "": "7"}', '{"x": "\\ud800"}']
    one, other = ([Input("uri", "a", "a", -1, "", metadata=text).version for text in texts] for texts in (earlier, now))
    assert one == other
    assert (one[0], len(set(one))) == ("", 3)


def test_uris_are_taken_literally(folder: Folder) -> None:
    """Also blanks around them: `a.jpg ` is another file than `a.jpg`."""
    for name in ("a.jpg ", " a.jpg"):
        folder.write(name, JPEG + name.encode())
    names = ["a.jpg ", " a.jpg", "a.jpg", " b.jpg"]
    lists = {
        "a.txt": "\n".join(names),
        "a.csv": "path\n" + "\n".join(names),
        "a.jsonl": "\n".join(json.dumps({"path": name}) for name in names),
    }
    paths = [str(folder.write(name, text.encode())) for name, text in lists.items()]
    rows = folder.rows(input=paths)
    assert outcomes(rows) == [(name, "missing" if name == " b.jpg" else None) for name in names] * 3
    assert [row.data and row.data.removeprefix(JPEG) for row in rows[:3]] == [b"a.jpg ", b" a.jpg", b"a"]
    assert "blanks belong to a name, and this one is" in str(rows[3].rejected)


def test_a_scheme_in_upper_case_is_the_same(folder: Folder) -> None:
    path = folder.write("a.txt", f"FILE://{folder.input}/a.jpg\nS3://\nGS://b/a.jpg\nfile://\n".encode())
    assert [row.rejected and row.rejected.reason for row in folder.rows(input=str(path))] == [
        None, "unreadable", "unreadable", "unreadable",
    ]  # fmt: skip
    assert folder.plan(input=f"File://{folder.input}/b.jpg").inputs == 1
    assert resolve("S3://Bucket/A.jpg", "x") == "s3://Bucket/A.jpg"


def test_a_column_without_a_name(folder: Folder) -> None:
    """pandas writes its index so; empty columns at the end of a line come from spreadsheets."""
    text = ",path,n,\n7,a.jpg,x,\n8,b.jpg,y, \n"
    assert rows_of(folder, "a.csv", text) == [("a.jpg", {"": "7", "n": "x"}), ("b.jpg", {"": "8", "n": "y"})]


def test_the_column_can_be_named(folder: Folder) -> None:
    text = "path,my photo;caption\na.jpg,b.jpg;x\n"
    assert rows_of(folder, "a.csv", text, lists={"column": "path"})[0][0] == "a.jpg"
    report = folder.plan(input=str(folder.write("b.csv", b"my photo;path\na.jpg;x\n")), lists={"column": "my photo"})
    assert report.columns.describe() == [f"column `my photo` of {folder.input}/b.csv"]
    with pytest.raises(ConfigError, match=r"line 1 is no header with a column for 'photo'.*it is my photo;path"):
        folder.plan(input=str(folder.input / "b.csv"), lists={"column": "photo"})
    with pytest.raises(ConfigError, match=r"lists\.column: .*c\.jsonl has no column 'photo'; it has path"):
        folder.plan(input=str(folder.write("c.jsonl", b'{"path": "a.jpg"}')), lists={"column": "photo"})


@pytest.mark.parametrize("remote", [False, True])
def test_a_list_that_is_gone_at_a_later_run_waits(
    folder: Folder, remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a folder does. At the first run it is a mistake in the configuration."""
    path = folder.write("l.csv", b"path,n\na.jpg,1\n")
    gone = "s3://bucket/gone.txt" if remote else str(folder.input / "gone.txt")
    monkeypatch.setitem(SCHEMES, "s3", lambda options: Nothing())
    inputs = [str(path), gone, str(folder.write("d/d.jpg", JPEG).parent)]
    with pytest.raises(ConfigError, match=r"gone\.txt does not exist"):
        folder.plan(input=inputs)
    assert folder.plan(input=[inputs[0], inputs[2]]).inputs == 2
    folder.write("d/e.jpg", JPEG)
    report = folder.plan(input=inputs)
    assert report.inputs == 1
    assert [(item.name, item.reason, item.detail) for item in report.waiting] == [
        (gone, "missing", f"input: {gone} does not exist now")
    ]
    report = folder.plan(input=inputs, on_missing="reject")
    assert (report.waiting, report.skipped.counts) == ([], {"inputs that do not exist": 1})


class Nothing:
    """A store without objects."""

    def stat(self, uri: str) -> None:
        return None

    def list(self, prefix: str, unreadable: object = None, links: object = None) -> list[Any]:
        return []


def test_a_row_that_was_missing_is_its_own_row(folder: Folder) -> None:
    """An image that a list named too early is tagged by a retry of the list's row, not once more for its folder."""
    path = folder.write("l.txt", b"d/x.jpg\n")
    assert outcomes(folder.rows(input=str(path))) == [("d/x.jpg", "missing")]
    folder.write("d/x.jpg", JPEG)
    assert folder.plan(input=[str(path), str(folder.input / "d")]).inputs == 0
    assert outcomes(folder.rows(input=str(path))) == [("d/x.jpg", None)]  # the same row is read again


def test_two_lists_count_equal_rows_together(folder: Folder) -> None:
    one, two = (str(folder.write(name, b"path,n\na.jpg,1\n")) for name in ("one.csv", "two.csv"))
    assert folder.plan(input=one).inputs == 1
    assert folder.plan(input=two).inputs == 0  # one equal row is planned
    assert folder.plan(input=[one, two]).inputs == 1
    assert folder.plan(input=[one, two]).inputs == 0


@pytest.mark.parametrize("name", ["a.csv.gz", "a.json", "a.xlsx", "list"])
def test_a_configured_file_of_another_kind_is_refused_by_name(folder: Folder, name: str) -> None:
    path = folder.write(name, b"a.jpg")
    with pytest.raises(ConfigError, match=rf"{name} is no image, tar, Parquet file or list \(\.txt, \.csv, \.tsv, "):
        folder.plan(input=[str(folder.input), str(path)])


def test_only_configured_lists_are_read(folder: Folder) -> None:
    for suffix in SUFFIXES:
        folder.write(f"list{suffix}", b"anything")
    assert folder.plan().inputs == 3


def test_values_of_a_table_are_strings_and_those_of_json_keep_their_types(folder: Folder) -> None:
    folder.write("a.jpg", JPEG)
    for name, text, metadata in (
        ("l.csv", b"path,price,n\na.jpg,1.50,007\n", {"price": "1.50", "n": "007"}),
        ("l.jsonl", b'{"path": "a.jpg", "price": 1.50, "n": 7, "s": "1.50"}\n', {"price": 1.5, "n": 7, "s": "1.50"}),
    ):
        path = folder.write(name, text)
        folder.output = path.with_suffix(f"{path.suffix}.out")
        [row] = folder.rows(input=str(path))
        assert json.loads(row.metadata or "") == metadata
