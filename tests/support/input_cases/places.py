"""Cases of the section "Folders and object stores"."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

from tests.support.images import encode, make_rgb
from tests.support.input_cases.case import InputCase

TITLE = "Folders and object stores"
TEXT = """A folder or an `s3://` prefix is read with everything below it. Files are told apart by the ends of their
names. Each object is an input once, also if two configured inputs hold it. Links to files and folders are followed,
but each folder is read once, whichever configured inputs and links lead to it, and a link to a folder that contains the
configured input is not followed. A file that is planned stays this input when other links to its folder are added. A
link to a file is an input beside the file.

What cannot be looked at does not stop the run. A folder that may not be entered, or that its disk does not deliver,
waits: the run tags the rest, names the folder and ends with exit code 1, because images may be missing. So does a
configured folder on a disk that is gone or empty, if something was there at an earlier run: a mount may be missing.
Set `on_missing: reject` if you delete inputs on purpose. A configured input that cannot be read at all is refused.

Inputs are files with these endings, in upper or lower case: `.jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff
.avif`, with `sightline[heic]` also `.heic .heif`; `.tar .tar.gz .tgz`; `.parquet .pq`. All others are skipped and
counted.

Names that other programs keep beside the data are hidden: names that begin with a dot, and the known names below.
Only the part of a path below the configured input counts, and a configured file or folder is read whatever its name.

An input that is deleted later stays in the output. A file has changed if its size or its modification time has, an
object if its ETag has. The bytes are not compared, so a file that is touched, or restored without its time, has
changed. An input that changes is not tagged again, and the run ends with exit code 1, unless
`on_changed: retag` is set: then its new version is tagged too, and the summary counts its images. The output has the
rows of both versions, also the reject of a file that was repaired; the later ones are in the shard with the higher
number, with which the names of files in `data/` and `rejects/` begin. `--retry-rejects` reads the planned version only:
rejects of an input that has changed stay as they are, and are counted.

An input may name days: `s3://bucket/images/dt={date}` is `dt=2026-11-30`, and `{date:%Y/%m/%d}` writes the day in
another way. The days are today and yesterday in UTC, or those of the key `dates` and of the option `--date`. A day
without a folder is counted, and no error. But the days wait if the part of the path before `{date}` does not exist or
is empty, and something was there at an earlier run.

The `manifest.json` of an S3 Inventory, itself configured as an input, takes the place of a listing of its bucket. The
inventory needs the fields Size and ETag, in CSV or Parquet. It is as old as its files: what was stored since then comes
with the next one. Keys are relative to the bucket.

In S3, the bucket may be an access point: its alias, or its ARN as in
`s3://arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME/prefix`.

Google Cloud Storage is `gs://bucket/prefix`, and Azure Blob Storage `az://container/prefix`, for inputs, outputs and
checkpoints, after `pip install 'sightline[cloud]'`. Credentials are the environment variables that obstore reads, on
each machine that reads or writes: `GOOGLE_APPLICATION_CREDENTIALS`, or the identity of the machine;
`AZURE_STORAGE_ACCOUNT_NAME` with `AZURE_STORAGE_ACCOUNT_KEY`, or the identity of the machine. The keys `s3` of a job
are for `s3://` alone. An object whose name has an empty part (`a//b`), a part `.` or `..`, or a control character
cannot be addressed there: a listing that meets one ends with its name. Azure's store is tested with Azurite, Google's
with a stand-in for its XML API, and neither with the service itself.

A new output needs a store that refuses to write an object that exists, because two runs could else overwrite each
other's rows. This is tried before any work; a server that ignores the condition is refused."""

_IMAGE = encode(make_rgb())
_LOOP = "links in a circle or to a folder that is read anyway"


def _write(*names: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(_IMAGE)

    return build


def _link(name: str, target: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        _write("a.png", "sub/b.png")(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(folder / target)

    return build


def _write_odd_name(folder: Path) -> None:
    _write("a.png")(folder)
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(_IMAGE)


def _make_special_files(folder: Path) -> None:
    _write("a.png")(folder)
    os.mkfifo(folder / "pipe.png")
    before = os.getcwd()
    os.chdir(folder)  # a socket's path has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    os.chdir(before)


def _nest_deeply(folder: Path) -> None:
    _write("a.png")(folder)
    before = os.getcwd()
    os.chdir(folder)
    for _ in range(17):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    os.chdir(before)


CASES: tuple[InputCase, ...] = (
    InputCase("an image in a folder of folders", "`key` is its path below the input", _write("a/b/c.png"), tagged=1),
    InputCase("partition folders such as `day=1`", "as any folder", _write("day=1/a.png", "x=a%20b/b.png"), tagged=2),
    InputCase("odd characters in a name", "stay", _write("a#1?.png", "new\nline.png", " ü.png"), tagged=3),
    InputCase("other files", "counted by suffix", _write("a.png", "b.xyz"), tagged=1, skipped={".xyz files": 1}),
    InputCase(
        "`.git`, `.cache`, `.ipynb_checkpoints`, `.Trash-1000`, `.DS_Store`, `._a.jpg`",
        "names that begin with a dot are hidden",
        _write("a.png", ".git/b.png", ".ipynb_checkpoints/b.png", "sub/.Trash-1000/b.png", "._a.png", ".b.png"),
        tagged=1,
        skipped={"hidden files": 5},
    ),
    InputCase(
        "`_temporary`, `_delta_log`, `_change_data`, `_SUCCESS`, `_metadata`, `_started_*`, `_committed_*`",
        "hidden: files of Spark, Hadoop and Delta Lake",
        _write("a.png", "_temporary/0/b.png", "_change_data/b.png", "_SUCCESS", "_delta_log/b.png"),
        tagged=1,
        skipped={"hidden files": 4},
    ),
    InputCase("other names that begin with `_`", "as any name", _write("_photos/_a.png"), tagged=1),
    InputCase(
        "`@eaDir`, `#recycle`, `#snapshot`, `@Recycle`, `__MACOSX`, `lost+found`, `$RECYCLE.BIN`, `RECYCLER`, "
        "`System Volume Information`, `@tmp`, `__pycache__`",
        "hidden: files of storage devices and operating systems",
        _write("a.png", "@eaDir/b.png", "#recycle/b.png", "__MACOSX/b.png", "lost+found/b.png", "$RECYCLE.BIN/b.png"),
        tagged=1,
        skipped={"hidden files": 5},
    ),
    InputCase(
        "a hidden folder that is itself the input",
        "read",
        _write(".cache/a.png"),
        tagged=1,
        settings={"input": "{folder}/.cache"},
    ),
    InputCase("a link to a file", "followed", _link("again.png", "sub/b.png"), tagged=3),
    InputCase(
        "a link to nothing",
        "counted and named",
        _link("link.png", "nowhere"),
        tagged=2,
        skipped={"broken links and special files": 1},
    ),
    InputCase("a link to itself", "counted and named", _link("link.png", "link.png"), tagged=2, skipped={_LOOP: 1}),
    InputCase("a link to a folder above", "not followed", _link("sub/up", "."), tagged=2, skipped={_LOOP: 1}),
    InputCase(
        "a link to a folder above the configured input",
        "not followed",
        _link("sub/up", "."),
        tagged=1,
        skipped={_LOOP: 1},
        settings={"input": "{folder}/sub"},
    ),
    InputCase(
        "two links to one folder, a link to a folder of the input itself",
        "each folder is read once",
        _link("again", "sub"),
        tagged=2,
        skipped={_LOOP: 1},
    ),
    InputCase(
        "a link to a folder of another configured input",
        "each folder is read once",
        _link("a/other", "sub"),
        tagged=1,
        skipped={_LOOP: 1},
        settings={"input": ["{folder}/a", "{folder}/sub"]},
    ),
    InputCase(
        "a folder, and a link to it as another configured input",
        "each object is an input once",
        _link("again", "sub"),
        tagged=1,
        settings={"input": ["{folder}/sub", "{folder}/again"]},
    ),
    InputCase(
        "an output of Sightline, a sample for `review`",
        "its own files are skipped, also if it is another job's; images beside them are read",
        _write("tags/labels.parquet", "tags/plan/000000.parquet", "tags/fingerprint.json", "tags/photos/b.png"),
        tagged=1,
        skipped={"files of outputs and samples of Sightline": 2, ".json files": 1},
    ),
    InputCase(
        "an empty path", "as from an unset variable", _write("a.png"), refused="is empty", settings={"input": ""}
    ),
    InputCase(
        "a path of over 4,095 bytes",
        "counted and named",
        _nest_deeply,
        tagged=1,
        skipped={"paths that are too long": 1},
    ),
    InputCase(
        "a pipe, a socket, a device",
        "counted and named",
        _make_special_files,
        tagged=1,
        skipped={"broken links and special files": 2},
    ),
    InputCase(
        "a name that is not UTF-8",
        "counted and named: Parquet has no such text",
        _write_odd_name,
        tagged=1,
        skipped={"names that are not UTF-8": 1},
    ),
    InputCase(
        "an input that does not exist",
        "refused at the first run; later it waits, because a mount may be missing",
        _write("a.png"),
        refused="does not exist",
        settings={"input": "{folder}/nowhere"},
    ),
    InputCase(
        "an input that is a link to itself",
        "refused",
        _link("link", "link"),
        refused="symbolic links",
        settings={"input": "{folder}/link"},
    ),
    InputCase("a folder without images", "refused", _write("a.xyz"), refused="no image, tar or Parquet file under"),
)
