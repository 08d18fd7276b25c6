"""Tars: every kind of header, ends of archive, damage, compression. No image of a tar vanishes without a word."""

from __future__ import annotations

import random
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import JobConfig
from pipelines.inputs import tar
from pipelines.inputs.rows import Input, Row
from storage.store import StoreOptions
from tests.support.tars import END, GNU, V7, header, list_outcomes, make_tar, member, pad, pax, read_tar, zip_tar

PHOTO = b"\xff\xd8" + b"photo" * 300 + b"\xff\xd9"
FIVE = [(f"{n}.jpg", PHOTO + b"%d" % n) for n in range(5)]
JOINED = "ends of archive inside tars (read on after them)"
PADDED = "tars with over 10 KiB of zeros at their end (taken for padding)"
STEP = 512 + len(pad(PHOTO + b"0"))


def plain(members: list[tuple[str, bytes]]) -> bytes:
    return b"".join(member(name.encode(), data) for name, data in members)


def keys(rows: list[Row]) -> list[str]:
    return [row.key for row in rows if not row.rejected]


def reasons(rows: list[Row]) -> list[str]:
    return [row.rejected.reason for row in rows if row.rejected]


WHOLE = [str(n) for n in range(5)]
HALVES = plain(FIVE[:3]), plain(FIVE[3:])


@pytest.mark.parametrize(
    "data",
    [
        make_tar(FIVE[:3]) + make_tar(FIVE[3:]),
        HALVES[0] + END + HALVES[1] + END,  # Go, Rust and Node pad nothing
        zip_tar(make_tar(FIVE[:3])) + zip_tar(make_tar(FIVE[3:])),
        zip_tar(make_tar(FIVE[:3]) + make_tar(FIVE[3:])) + bytes(600),
        pad(HALVES[0] + END, 1 << 20) + pad(HALVES[1] + END, 1 << 13),
    ],
    ids=["python", "unpadded", "gzip members", "gzip padded", "large records"],
)
def test_tars_that_were_joined_are_read_to_the_last(tmp_path: Path, data: bytes) -> None:
    rows, skipped = read_tar(tmp_path / "a.tar", data)
    assert (keys(rows), reasons(rows), skipped.counts) == (WHOLE, [], {JOINED: 1})
    assert [row.data for row in rows] == [data for _, data in FIVE]


@pytest.mark.parametrize(
    ("data", "found", "reason", "text"),
    [
        (HALVES[0] + bytes(512) + HALVES[1] + END, "01234", "corrupt_archive", "from byte 6144 to byte 6656"),
        (HALVES[0] + bytes(STEP) + HALVES[1] + END, "01234", "corrupt_archive", "members may be missing"),
        (HALVES[0] + bytes(512) + HALVES[1][512:] + END, "0124", "corrupt_archive", "no tar header at byte 6656"),
        (HALVES[0][:-1024] + bytes(1024 + STEP) + HALVES[1] + END, "01234", "corrupt_archive", "from within 2.jpg"),
        (plain(FIVE) + END + b"no tar" * 500, "01234", "corrupt_archive", "no tar header"),
        (plain(FIVE) + END + b"short", "01234", "corrupt_archive", "no tar header"),
        (b"\1" * 2048 + plain(FIVE) + END, "01234", "corrupt_archive", "no tar header at byte 0"),
        (HALVES[0] + b"\1" * 1024 + HALVES[1] + b"\1" * 512 + END, "01234", "corrupt_archive", "and 1 more places"),
        (HALVES[0], "012", "truncated_archive", "no end of archive"),
        (HALVES[0][:-600], "01", "truncated_archive", "ends within 2.jpg"),
        (HALVES[0] + HALVES[1][:100], "012", "truncated_archive", "no end of archive"),
        (HALVES[0] + bytes(1 << 20), "012", "truncated_archive", "too many to be padding"),
        (HALVES[0][:-1024] + bytes(3000), "012", "truncated_archive", "from within 2.jpg"),
        (bytes(1 << 19) + b"\0" * 100, "", "truncated_archive", "nothing but 524388 zeros"),
        (b"", "", "truncated_archive", "empty"),
    ],
)
def test_damage_is_a_reject_row_and_all_else_is_read(
    tmp_path: Path, data: bytes, found: str, reason: str, text: str
) -> None:
    for content in (data, zip_tar(data)):
        rows, _ = read_tar(tmp_path / "a.tar", content)
        assert (keys(rows), reasons(rows)) == (list(found), [reason])
        assert rows[-1].rejected is not None
        assert text in rows[-1].rejected.detail
        assert rows[-1].key == "a.tar"


@pytest.mark.parametrize("zeros", [512, 1024, 9 * 1024, 100_000])
def test_padding_of_usual_length_is_no_damage(tmp_path: Path, zeros: int) -> None:
    data = plain(FIVE)
    whole = pad(data + bytes(zeros), 1 << 17) if zeros > 10_000 else data + bytes(zeros)
    rows, skipped = read_tar(tmp_path / "a.tar", whole)
    assert (keys(rows), reasons(rows), skipped.counts) == (WHOLE, [], {PADDED: 1} if zeros > 10_000 else {})


@pytest.mark.parametrize("factor", [1, 2, 20, 63, 64, 100, 126, 128, 200, 700, 2000, 4096, 8192, 10_000])
def test_padding_to_each_blocking_factor_is_no_damage(tmp_path: Path, factor: int) -> None:
    """`tar -b N` pads to N blocks, in the middle too when such tars are joined. No padding counts as rows."""
    whole = pad(plain(FIVE) + END, factor * 512)
    rows, skipped = read_tar(tmp_path / "a.tar", whole)
    assert (keys(rows), reasons(rows)) == (WHOLE, [])
    assert skipped.counts == ({PADDED: 1} if factor > 40 else {})
    assert estimate(tmp_path / "a.tar") == 5
    if factor in (1, 20, 63, 64, 2000):
        rows, skipped = read_tar(
            tmp_path / "a.tar", pad(HALVES[0] + END, factor * 512) + pad(HALVES[1] + END, factor * 512)
        )
        assert (keys(rows), reasons(rows)) == (WHOLE, [])
        assert skipped.counts == ({JOINED: 1, PADDED: 1} if factor > 40 else {JOINED: 1})


@pytest.mark.parametrize("ends", [1, 2, 3])
def test_ends_that_tar_keeps_when_it_joins_are_no_damage(tmp_path: Path, ends: int) -> None:
    """`tar -A` overwrites the end of the first archive only, and pads the whole again."""
    data = plain(FIVE) + bytes(10_000 * ends)
    rows, skipped = read_tar(tmp_path / "a.tar", pad(data, 10_240))
    assert (keys(rows), reasons(rows)) == (WHOLE, [])
    assert skipped.counts == ({PADDED: 1} if ends > 1 else {})


def estimate(path: Path) -> int:
    config = JobConfig(input=str(path), output=str(path.parent / "out"), labels=["a"])
    planned = Input("tar", str(path), path.name, path.stat().st_size, "")
    return tar.inspect(planned, config, StoreOptions()).parts[0].rows


def test_a_preallocated_download_that_broke_off_says_what_is_missing(tmp_path: Path) -> None:
    """Zeros from the middle on: the images behind are not there, at whatever byte the zeros begin."""
    images = [(f"{n:03}.jpg", PHOTO * 3) for n in range(160)]
    data = make_tar(images)
    for start in range(len(data) // 2, len(data) // 2 + 6000, 256):
        rows, _ = read_tar(tmp_path / "a.tar", data[:start] + bytes(len(data) - start))
        assert len(reasons(rows)) == 1
        assert len(keys(rows)) + rows[-1].lost + 1 >= 158
        assert rows[-1].rejected is not None
        assert "images are lost" in rows[-1].rejected.detail


def test_zeros_at_the_end_of_a_whole_image_are_no_damage(tmp_path: Path) -> None:
    """Some cameras pad a JPEG with zeros, and a bitmap may end with black pixels."""
    for name, data in (
        ("1.jpg", PHOTO + bytes(4096)),
        ("1.png", b"IEND\xaeB`\x82" + bytes(600)),
        ("1.BMP", bytes(5000)),
    ):
        rows, _ = read_tar(tmp_path / "a.tar", make_tar([(name, data)]))
        assert list_outcomes(rows) == [("1", data)]


def test_a_hole_anywhere_costs_a_reject_row_or_damages_an_image_that_is_there(tmp_path: Path) -> None:
    """A hole that reaches to the padding looks like more padding, which is counted."""
    data = make_tar(FIVE)
    for size in (512, 4096):
        for start in range(0, len(plain(FIVE)), 512):
            rows, skipped = read_tar(tmp_path / "a.tar", data[:start] + bytes(size) + data[start + size :])
            assert len(keys(rows)) == 5 or reasons(rows) or PADDED in skipped.counts, (size, start)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (zip_tar(make_tar(FIVE))[:-8] + b"\0\1\2\3" + zip_tar(make_tar(FIVE))[-4:], "corrupt_archive"),  # CRC
        (zip_tar(make_tar(FIVE))[:-4] + b"\1\2\3\4", "corrupt_archive"),  # length
        (zip_tar(make_tar(FIVE))[:-3], "truncated_archive"),
        (zip_tar(make_tar(FIVE)) + b"garbage", "corrupt_archive"),
        (zip_tar(make_tar(FIVE)) + zip_tar(make_tar([]))[:9], "truncated_archive"),
        (zip_tar(make_tar(FIVE)) + bytes(2 << 20), "truncated_archive"),
    ],
    ids=["crc", "length", "cut trailer", "garbage", "cut member", "zeros"],
)
def test_the_end_of_a_gzip_file_is_checked(tmp_path: Path, data: bytes, reason: str) -> None:
    rows, _ = read_tar(tmp_path / "a.tar.gz", data)
    assert (keys(rows), reasons(rows)) == (WHOLE, [reason])


@pytest.mark.parametrize("cut", [0.02, 0.5, 0.9])
def test_what_is_before_the_cut_of_a_gzip_file_is_read(tmp_path: Path, cut: float) -> None:
    noise = [(f"{n}.jpg", random.Random(n).randbytes(40_000)) for n in range(5)]
    data = zip_tar(make_tar(noise))
    rows, _ = read_tar(tmp_path / "a.tar.gz", data[: int(len(data) * cut)])
    assert (len(keys(rows)), reasons(rows)) == (int(5 * cut), ["truncated_archive"])
    assert [row.data for row in rows[:-1]] == [data for _, data in noise[: len(rows) - 1]]


@pytest.mark.parametrize(
    ("start", "name"), [(b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh9", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"PK\3\4", "zip")]
)
def test_another_compression_is_named(tmp_path: Path, start: bytes, name: str) -> None:
    for data in (start, start + b"x" * 5000, zip_tar(start + b"x" * 5000)):
        rows, _ = read_tar(tmp_path / "a.tar", data)
        assert reasons(rows) == ["corrupt_archive"]
        assert name in str(rows[0].rejected)


def test_a_tar_without_files_is_counted(tmp_path: Path) -> None:
    for data in (bytes(1024), bytes(10240), member(b"folder/", b"", b"5") + END):
        rows, skipped = read_tar(tmp_path / "a.tar", data)
        assert (rows, skipped.counts) == ([], {"tars without a file in them": 1})


LONG = b"folder/" * 30 + b"1.jpg"
NAMES: list[tuple[str, bytes, str]] = [
    ("v7", member(b"1.jpg", PHOTO, b"\0", V7), "1"),
    ("ustar", member(b"1.jpg", PHOTO, at345=b"a/b"), "a/b/1"),
    ("gnu", member(b"1.jpg", PHOTO, magic=GNU), "1"),
    ("gnu incremental", member(b"1.jpg", PHOTO, magic=GNU, at345=b"15012345670\x0015012345670\0"), "1"),
    ("star", member(b"1.jpg", PHOTO, at345=b"p" * 131 + b"15012345670\0", at508=b"tar\0"), "p" * 131 + "/1"),
    ("hundred", member(b"x" * 96 + b".jpg", PHOTO), "x" * 96),
    (
        "gnu long",
        member(b"@LongLink", LONG + b"\0", b"L", GNU) + member(LONG[:100], PHOTO, magic=GNU),
        LONG[:-4].decode(),
    ),
    ("long link", member(b"@LongLink", b"x" * 300, b"K", GNU) + member(b"1.jpg", PHOTO, magic=GNU), "1"),
    ("pax", pax([(b"path", "é/1.jpg".encode())]) + member(b"x.jpg", PHOTO), "é/1"),
    ("pax binary", pax([(b"hdrcharset", b"BINARY"), (b"path", b"\xe9.jpg")]) + member(b"x", PHOTO), "\ufffd"),
    ("pax size", pax([(b"size", b"%d" % len(PHOTO))]) + header(b"1.jpg", 0) + pad(PHOTO), "1"),
    ("pax solaris", pax([(b"path", b"1.jpg")], b"X") + member(b"x.jpg", PHOTO), "1"),
    ("pax twice", pax([(b"path", b"2.jpg")]) + pax([(b"mtime", b"1")]) + member(b"1.jpg", PHOTO), "2"),
    ("pax empty", pax([(b"path", b"2.jpg")]) + pax([(b"path", b"")]) + member(b"1.jpg", PHOTO), "1"),
    ("pax global", pax([(b"comment", b"0" * 40)], b"g") + member(b"1.jpg", PHOTO), "1"),
    ("base 256", header(b"1.jpg", b"\x80" + len(PHOTO).to_bytes(11, "big")) + pad(PHOTO), "1"),
    ("spaces", header(b"1.jpg", b"%11o " % len(PHOTO)) + pad(PHOTO), "1"),
    ("contiguous", member(b"1.jpg", PHOTO, b"7"), "1"),
    ("unknown type", member(b"1.jpg", PHOTO, b"Z"), "1"),
    ("dot", member(b"./1.jpg", PHOTO), "1"),
    ("absolute", member(b"/etc/1.jpg", PHOTO), "/etc/1"),
    ("parent", member(b"../1.jpg", PHOTO), "../1"),
    ("windows", member(b"v1.0\\1.jpg", PHOTO), "v1.0\\1"),
    ("folder with a size", header(b"d", 4096, b"5") + member(b"1.jpg", PHOTO), "1"),
    ("folder with data", member(b"d", b"d" * 700, b"5") + member(b"1.jpg", PHOTO), "1"),
    ("label", header(b"volume", 0, b"V") + member(b"1.jpg", PHOTO), "1"),
    ("list of a folder", member(b"d/", b"Y1.jpg\0\0", b"D", GNU) + member(b"1.jpg", PHOTO, magic=GNU), "1"),
]


@pytest.mark.parametrize(("data", "key"), [case[1:] for case in NAMES], ids=[case[0] for case in NAMES])
def test_every_kind_of_header_gives_the_name_and_the_bytes(tmp_path: Path, data: bytes, key: str) -> None:
    rows, skipped = read_tar(tmp_path / "a.tar", data + member(b"9.jpg", b"next") + END)
    assert list_outcomes(rows) == [(key, PHOTO), ("9", b"next")]
    assert skipped.counts == {}


def test_links_are_counted_whether_they_have_data_or_not(tmp_path: Path) -> None:
    links = header(b"2.jpg", 700, b"1", at157=b"1.jpg") + header(b"3.jpg", 0, b"2") + member(b"4.jpg", PHOTO, b"1")
    rows, skipped = read_tar(tmp_path / "a.tar", member(b"1.jpg", PHOTO) + links + member(b"9.jpg", PHOTO) + END)
    assert list_outcomes(rows) == [("1", PHOTO), ("9", PHOTO)]
    assert skipped.counts == {"links and devices in tars": 3}


HOLED = b"head" + bytes(1020) + b"tail" * 2
MAP = [(0, 4), (1024, 8)]
STORED = b"headtailtail"


def sparse_headers() -> list[tuple[str, bytes]]:
    ints = [b"%d" % number for piece in MAP for number in piece]
    size = b"%d" % len(HOLED)
    v00 = [(b"GNU.sparse.size", size), (b"GNU.sparse.numblocks", b"2")]
    v00 += [(b"GNU.sparse." + (b"offset", b"numbytes")[n % 2], number) for n, number in enumerate(ints)]
    v01 = [(b"GNU.sparse.size", size), (b"GNU.sparse.map", b",".join(ints)), (b"GNU.sparse.name", b"1.jpg")]
    v10 = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"1.jpg")]
    v10 += [(b"GNU.sparse.realsize", size)]
    inside = pad(b"2\n" + b"".join(number + b"\n" for number in ints))
    octal = [b"%011o\0" % number for piece in MAP for number in piece]
    old: dict[str, bytes] = {"at386": b"".join(octal), "at483": b"%011o\0" % len(HOLED)}
    more = pad(b"".join(octal), 504)[:504] + b"\0" * 8
    later = {"at386": b"", "at482": b"\1", "at483": b"%011o\0" % len(HOLED)}
    return [
        ("0.0", pax(v00) + member(b"1.jpg", STORED)),
        ("0.1", pax(v01) + member(b"GNUSparseFile.0/1.jpg", STORED)),
        ("1.0", pax(v10) + member(b"GNUSparseFile.0/1.jpg", inside + STORED)),
        ("old", member(b"1.jpg", STORED, b"S", GNU, **old)),
        ("old, extended", header(b"1.jpg", len(STORED), b"S", GNU, **later) + more + pad(STORED)),
    ]


@pytest.mark.parametrize("data", [case[1] for case in sparse_headers()], ids=[case[0] for case in sparse_headers()])
def test_sparse_files_come_out_with_their_holes(tmp_path: Path, data: bytes) -> None:
    rows, _ = read_tar(tmp_path / "a.tar", data + member(b"9.jpg", PHOTO) + END)
    assert list_outcomes(rows) == [("1", HOLED), ("9", PHOTO)]


@pytest.mark.parametrize(
    "records",
    [
        [(b"GNU.sparse.size", b"100"), (b"GNU.sparse.map", b"0,4,98,8")],
        [(b"GNU.sparse.size", b"100"), (b"GNU.sparse.map", b"0,4")],
        [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"100")],
    ],
)
def test_a_sparse_image_with_a_broken_map_is_a_reject_row(tmp_path: Path, records: Any) -> None:
    data = pax(records) + member(b"1.jpg", STORED) + member(b"9.jpg", PHOTO) + END
    rows, _ = read_tar(tmp_path / "a.tar", data)
    assert list_outcomes(rows) == [("1", "unreadable"), ("9", PHOTO)]


def test_a_sparse_file_of_millions_of_pieces_is_refused(tmp_path: Path) -> None:
    inside = pad(b"3000000\n" + b"0\n1\n" * 3_000_000)
    data = pax([(b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"3000000")]) + member(b"1.jpg", inside) + END
    rows, _ = read_tar(tmp_path / "a.tar", data)
    assert reasons(rows) == ["unreadable"]


def test_the_second_volume_of_a_tar_rejects_the_image_that_began_in_the_first(tmp_path: Path) -> None:
    first, _ = read_tar(tmp_path / "1.tar", (member(b"1.jpg", PHOTO) + member(b"2.jpg", PHOTO))[:3000])
    assert list_outcomes(first) == [("1", PHOTO), ("1.tar", "truncated_archive")]
    second, _ = read_tar(tmp_path / "2.tar", member(b"2.jpg", PHOTO[700:], b"M", GNU) + member(b"3.jpg", PHOTO) + END)
    assert list_outcomes(second) == [("2", "truncated"), ("3", PHOTO)]


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (header(b"1.jpg", b"\xff" * 12) + pad(PHOTO), ["9"]),  # a negative size
        (header(b"1.jpg", b"99999999999\0") + pad(PHOTO), ["9"]),  # no octal digits
        (member(b"PaxHeaders/x", b"99 path=2.jpg\n", b"x") + member(b"1.jpg", PHOTO), ["9"]),
        (member(b"PaxHeaders/x", b"12 size=-12\n", b"x") + member(b"1.jpg", PHOTO), ["9"]),
        (pax([(b"path", b"1.jpg")]) + bytes(512) + pad(PHOTO), []),  # 9.jpg may have had such a header too
        (pax([(b"path", b"1.jpg")]) + END, ["9"]),
    ],
)
def test_headers_that_cannot_be_right_are_damage(tmp_path: Path, data: bytes, found: list[str]) -> None:
    rows, _ = read_tar(tmp_path / "a.tar", data + member(b"9.jpg", PHOTO) + END)
    assert (keys(rows), reasons(rows)) == (found, ["corrupt_archive"])


@pytest.mark.parametrize("name", ["ü/1.jpg", "folder/" * 30 + "1.jpg"])
def test_no_image_gets_a_wrong_name_when_its_extended_header_is_damaged(tmp_path: Path, name: str) -> None:
    data = make_tar([(name, PHOTO), ("9.jpg", PHOTO)])
    for hole in (b"\1" * 512, bytes(512)):
        rows, _ = read_tar(tmp_path / "a.tar", hole + data[512:])
        assert list_outcomes(rows) == [("9", PHOTO), ("a.tar", "corrupt_archive")]


@pytest.mark.parametrize(
    "data",
    [
        header(b"1.jpg", b"\x80" + b"\x7f" * 11),
        header(b"1.mp4", b"\x80" + b"\0" * 3 + b"\xff" * 8),
        pax([(b"size", b"9" * 20)]) + header(b"1.jpg", 0),
        header(b"1", b"\x80" + b"\x7f" * 11, b"1"),
        header(b"x", b"\x80" + b"\x7f" * 11, b"x"),
        header(b"@LongLink", b"\x80" + b"\x7f" * 11, b"L", GNU),
        header(b"1.jpg", b"\x80" + b"\x7f" * 11, b"S", GNU, at483=b"\x80" + b"\x7f" * 11),
    ],
)
def test_a_size_beyond_all_bounds_is_a_tar_that_ends_early(tmp_path: Path, data: bytes) -> None:
    whole = member(b"0.jpg", PHOTO) + data + b"x" * 1000 + END
    for content in (whole, zip_tar(whole)):
        rows, _ = read_tar(tmp_path / "a.tar", content)
        assert (keys(rows), reasons(rows)[-1]) == (["0"], "truncated_archive")


def test_a_sparse_file_of_a_negative_size_is_damage(tmp_path: Path) -> None:
    data = member(b"1.jpg", STORED, b"S", GNU, at386=b"%011o\0%011o\0" % (0, len(STORED)), at483=b"\xff" * 12)
    rows, _ = read_tar(tmp_path / "a.tar", data + member(b"9.jpg", PHOTO) + END)
    assert list_outcomes(rows) == [("9", PHOTO), ("a.tar", "corrupt_archive")]


def test_extended_headers_of_any_size_take_little_memory(tmp_path: Path) -> None:
    """780 MiB of a PAX header are 0.78 MB of gzip. Inspections run in the driver, 16 at once."""
    huge = header(b"x", 64 << 20, b"x") + b"67108864 comment=" + bytes((64 << 20) - 17)
    data = zip_tar(huge + member(b"1.jpg", PHOTO) + member(b"9.jpg", PHOTO) + END)
    tracemalloc.start()
    rows, _ = read_tar(tmp_path / "a.tar.gz", data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (keys(rows), reasons(rows)) == (["9"], ["corrupt_archive"])
    assert peak < 16 << 20


@pytest.mark.parametrize("extended", [pax([(b"mtime", b"1")]), member(b"@LongLink", b"n.jpg\0", b"L", GNU)])
def test_a_chain_of_extended_headers_is_no_recursion(tmp_path: Path, extended: bytes) -> None:
    rows, _ = read_tar(tmp_path / "a.tar", extended * 1500 + member(b"1.jpg", PHOTO) + END)
    assert len(keys(rows)) == 1
    rows, _ = read_tar(tmp_path / "a.tar", extended * 3000 + member(b"1.jpg", PHOTO) + member(b"9.jpg", PHOTO) + END)
    assert keys(rows)[-1] == "9"
    assert len(keys(rows)) + len(reasons(rows)) == 2


def test_a_name_that_comes_twice_is_two_rows_with_their_own_metadata(tmp_path: Path) -> None:
    """`tar -r` appends a newer version, and a joined tar may hold the same names again."""
    pair = [("1.jpg", PHOTO), ("1.json", b'"old"'), ("1.jpg", PHOTO + b"new"), ("1.json", b'"new"')]
    rows, _ = read_tar(tmp_path / "a.tar", make_tar(pair))
    assert [(row.key, row.metadata) for row in rows] == [("1", '{"json": "old"}'), ("1", '{"json": "new"}')]
    joined, _ = read_tar(tmp_path / "b.tar", make_tar(pair[:2]) + make_tar(pair[2:]))
    assert [row.metadata for row in joined] == [row.metadata for row in rows]


def test_large_members_that_are_no_images_are_passed_over(tmp_path: Path) -> None:
    movie = ("1.mp4", bytes(5 << 20))
    rows, skipped = read_tar(tmp_path / "a.tar", make_tar([movie, ("1.jpg", PHOTO), movie, ("2.jpg", PHOTO)]))
    assert (keys(rows), reasons(rows), skipped.counts) == (["1", "2"], [], {".mp4 files": 2})
    cut, _ = read_tar(tmp_path / "a.tar", make_tar([("1.jpg", PHOTO), movie])[: 3 << 20])
    assert reasons(cut) == ["truncated_archive"]


def test_python_and_this_reader_agree_on_its_formats(tmp_path: Path) -> None:
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form) as archive:
            for name in ("a/" * 60 + "1.jpg", "b/2.jpg"):
                (tmp_path / "file").write_bytes(PHOTO + name.encode())
                archive.add(tmp_path / "file", name)
        rows, _ = read_tar(path)
        with tarfile.open(path) as archive:
            assert [row.key + ".jpg" for row in rows] == archive.getnames()
            assert [len(row.data or b"") for row in rows] == [info.size for info in archive]


def test_padding_is_not_counted_as_lost_images(tmp_path: Path) -> None:
    """A tar with a damaged place, and padded to 2 MiB as `tar -b 4096` does."""
    data = pad(HALVES[0] + b"\1" * 512 + HALVES[1] + END, 4096 * 512)
    rows, _ = read_tar(tmp_path / "a.tar", data)
    assert (keys(rows), reasons(rows), rows[-1].lost) == (WHOLE, ["corrupt_archive"], 0)
    assert rows[-1].rejected is not None
    assert "lost" not in rows[-1].rejected.detail
