"""Cases of the section "Tars"."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from tests.support.input_cases.case import InputCase
from tests.support.tars import END, GNU, V7, header, make_tar, member, pad, pax, zip_tar

TITLE = "Tars"
TEXT = (
    "Tars are read in WebDataset's layout: consecutive members with the same path up to the file name's first dot are "
    "one sample. Each image is a row. A sample's only image has the sample's name as key; several have their members' "
    "names, as has one with a date (`2024.05.000001.jpg`). `.json`, `.txt` and `.cls` members become the `metadata` "
    "of their sample's images, as one JSON object with the extensions as keys. A number after the first dot counts as "
    "part of the name: `2024.05.000001.json` belongs to `2024.05.000001.jpg` (under the key `json`), or else to an "
    "image `2024.jpg`, and to no other. A sample of more than 256 images or 128 MiB is read in parts. There this "
    "holds for each name with several dots, and metadata of all its images have to come first. A tar is read once, "
    "from the first byte to the last; gzip is told by its first bytes. All formats are read (v7, ustar, PAX, GNU, "
    "star). What is damaged costs one row in `rejects/`, which says at which byte, and about how many images are "
    "lost; the images before and behind the damage are tagged."
)

JOINED = "ends of archive inside tars (read on after them)"


def make_photo(number: int = 0) -> bytes:
    """Return a small JPEG, another one for each number."""
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").rotate(10 * number).resize((64, 64)).save(buffer, "JPEG")
    return buffer.getvalue()


PHOTO = make_photo()
FOUR = [(f"{n}.jpg", make_photo(n)) for n in range(4)]
TWO, OTHER_TWO = FOUR[:2], FOUR[2:]


def plain(members: list[tuple[str, bytes]]) -> bytes:
    """Return members without an end of archive."""
    return b"".join(member(name.encode(), data) for name, data in members)


def write(data: bytes, name: str = "a.tar") -> Callable[[Path], object]:
    """Return a function that writes one file into a folder."""
    return lambda folder: (folder / name).write_bytes(data)


def _sparse() -> bytes:
    """Return a BMP with a black half, stored as GNU tar stores a file with a hole."""
    buffer = io.BytesIO()
    image = Image.new("RGB", (64, 128))
    image.paste((200, 100, 50), (0, 64, 64, 128))
    image.save(buffer, "BMP")
    data = buffer.getvalue()
    start = len(data) - 64 * 64 * 3
    records = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"1.bmp")]
    records += [(b"GNU.sparse.realsize", b"%d" % len(data))]
    inside = pad(b"2\n0\n%d\n%d\n0\n" % (start, len(data)))
    return pax(records) + member(b"GNUSparseFile.0/1.bmp", inside + data[:start]) + END


def _links() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("1.jpg")
        info.size = len(PHOTO)
        archive.addfile(info, io.BytesIO(PHOTO))
        for name, kind in (("2.jpg", tarfile.LNKTYPE), ("3.jpg", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "1.jpg"
            archive.addfile(link)
    return buffer.getvalue()


_DATES = [
    (f"2024.05.{n:06}.{suffix}", PHOTO if suffix == "jpg" else b"{}") for n in range(300) for suffix in ("jpg", "json")
]
_BOMB = header(b"x", 8 << 20, b"x") + b"8388608 comment=" + bytes((8 << 20) - 16)
_LONG = b"folder/" * 40 + b"1.jpg"

CASES: tuple[InputCase, ...] = (
    InputCase(
        "an image with `.json`, `.txt` or `.cls` beside it",
        "one sample: the image is a row, the others are its `metadata`",
        write(make_tar([("1.jpg", PHOTO), ("1.json", b'{"a": 1}'), ("1.cls", b"7")])),
        tagged=1,
    ),
    InputCase(
        "several images with one name up to the first dot",
        "one sample with shared metadata; the keys are the members' names",
        write(make_tar([("1.left.jpg", PHOTO), ("1.right.jpg", PHOTO), ("1.json", b"{}")])),
        tagged=2,
    ),
    InputCase(
        "names with dots, such as `2024.05.000001.jpg`",
        "each image has its own metadata; the keys are the members' names",
        write(make_tar(_DATES)),
        tagged=300,
    ),
    InputCase(
        "a name that comes twice, as after `tar -r`",
        "two rows with one key, each with the metadata behind it",
        write(make_tar([TWO[0], TWO[0]])),
        tagged=2,
    ),
    InputCase(
        "metadata without an image",
        "no row; counted",
        write(make_tar([("1.jpg", PHOTO), ("2.json", b"{}")])),
        tagged=1,
        skipped={"metadata files without an image": 1},
    ),
    InputCase(
        "metadata over 8 MiB in one sample, or shared by so many images that it would be more",
        "the image is tagged without them; counted",
        write(make_tar([("1.jpg", PHOTO), ("1.txt", b"x" * (9 << 20))])),
        tagged=1,
        skipped={"metadata files over 8 MiB in their sample": 1},
    ),
    InputCase(
        "JSON with NaN, Infinity, or numbers that no double holds",
        "strings with what stood there: `metadata` is always JSON",
        write(make_tar([("1.jpg", PHOTO), ("1.json", b'{"a": NaN, "b": 1e999}')])),
        tagged=1,
    ),
    InputCase(
        "JSON that is broken, nested over 100 levels, or has a key twice",
        "a string with the whole text",
        write(make_tar([("1.jpg", PHOTO), ("1.json", b'{"a": 1, "a": 2}')])),
        tagged=1,
    ),
    InputCase(
        "other members, hidden files, links and devices",
        "counted; a hard link is no second row",
        write(_links()),
        tagged=1,
        skipped={"links and devices in tars": 2},
    ),
    InputCase(
        "`.tar.gz`, also of several gzip members, also named `.tar`",
        "unpacked while it is read; the checksum and the length at its end are checked",
        write(zip_tar(make_tar(TWO)[:3000]) + zip_tar(make_tar(TWO)[3000:])),
        tagged=2,
    ),
    InputCase(
        "two tars joined (`cat a.tar b.tar`)",
        "read on, as `tar --ignore-zeros` does; counted",
        write(make_tar(TWO) + make_tar(OTHER_TWO)),
        tagged=4,
        skipped={JOINED: 1},
    ),
    InputCase(
        "padding with zeros: to records of 10 KiB, or after gzip",
        "no damage",
        write(zip_tar(pad(plain(TWO) + END, 10_240)) + bytes(900)),
        tagged=2,
    ),
    InputCase(
        "longer padding: to another record size (`tar -b`), or of tars joined with `tar -A`",
        "no damage, but counted: members may have been there. Records of up to 128 blocks, and of 2^n or round numbers "
        "of blocks up to 10,000",
        write(pad(plain(TWO) + END, 2000 * 512)),
        tagged=2,
        skipped={"tars with over 10 KiB of zeros at their end (taken for padding)": 1},
    ),
    InputCase(
        "a tar with nothing in it",
        "counted",
        write(make_tar([])),
        skipped={"tars without a file in them": 1},
    ),
    InputCase(
        "a tar that breaks off, with or without zeros up to its size",
        "the images before; one row for the rest. Zeros are no padding if they begin within an image or metadata, or "
        "are 11 KiB and more and do not fill a record",
        write(plain(TWO) + bytes(50_000)),
        tagged=2,
        rejected={"truncated_archive": 1},
    ),
    InputCase(
        "a tar without its end of archive",
        "all images, and one row: there may have been more",
        write(plain(FOUR)),
        tagged=4,
        rejected={"truncated_archive": 1},
    ),
    InputCase(
        "a hole of zeros between members, or over a header",
        "the images before and behind it, and one row",
        write(plain(TWO) + bytes(512) + plain(OTHER_TWO)[512:] + END),
        tagged=3,
        rejected={"corrupt_archive": 1},
    ),
    InputCase(
        "other bytes at the beginning, in the middle or after the end",
        "all images found by their headers, and one row",
        write(b"\1" * 512 + plain(TWO) + b"\1" * 1024 + plain(OTHER_TWO) + END + b"signature"),
        tagged=4,
        rejected={"corrupt_archive": 1},
    ),
    InputCase(
        "a wrong checksum or length at the end of gzip, or other bytes after it",
        "all images, and one row",
        write(zip_tar(make_tar(TWO))[:-4] + b"\0\0\0\1"),
        tagged=2,
        rejected={"corrupt_archive": 1},
    ),
    InputCase(
        "zstd, bzip2, xz, zip, 7z, ... named `.tar`, `.tar.gz` or `.tgz`",
        "the reason names the format",
        write(b"\x28\xb5\x2f\xfd" + bytes(600)),
        rejected={"corrupt_archive": 1},
    ),
    InputCase(
        "an empty file named `.tar`",
        "one row",
        write(b""),
        rejected={"truncated_archive": 1},
    ),
    InputCase(
        "long names (PAX, GNU), v7 headers, binary sizes, incremental GNU tars",
        "the name and the bytes that GNU tar gives",
        write(
            pax([(b"path", _LONG)])
            + member(_LONG[:100], PHOTO)
            + member(b"2.jpg", PHOTO, b"\0", V7)
            + header(b"3.jpg", b"\x80" + len(PHOTO).to_bytes(11, "big"))
            + pad(PHOTO)
            + member(b"4.jpg", PHOTO, magic=GNU, at345=b"15012345670\0")
            + END
        ),
        tagged=4,
    ),
    InputCase(
        "an image stored as a sparse file (GNU 0.0, 0.1, 1.0 and old)",
        "with its holes as zeros; a broken map is `unreadable`",
        write(_sparse()),
        tagged=1,
    ),
    InputCase(
        "the second volume of a tar in several volumes",
        "the image that began in the first volume is `truncated`, the others are read",
        write(member(b"1.jpg", PHOTO[700:], b"M", GNU) + plain(OTHER_TWO) + END),
        tagged=2,
        rejected={"truncated": 1},
    ),
    InputCase(
        "an extended header over 1 MiB, or one that is broken",
        "not held in memory; its member is not read, since its name may be another",
        write(zip_tar(_BOMB + plain(FOUR) + END), "a.tar.gz"),
        tagged=3,
        rejected={"corrupt_archive": 1},
    ),
    InputCase(
        "an image over `limits.max_bytes`",
        "one row; its bytes are not held",
        write(make_tar([("1.jpg", bytes(3_000_000)), TWO[0]])),
        tagged=1,
        rejected={"too_many_bytes": 1},
        settings={"limits": {"max_bytes": 2_000_000}},
    ),
)
