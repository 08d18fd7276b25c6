"""Cases of the section "Datasets on the Hugging Face hub"."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.images import encode, make_rgb
from tests.support.input_cases.case import InputCase
from tests.support.stores.hub_server import Reply, refuse
from tests.support.tars import make_tar

TITLE = "Datasets on the Hugging Face hub"
TEXT = """`hf://datasets/OWNER/NAME` is an input like a prefix of an object store: a whole dataset, or a folder or a
file of it, as in `hf://datasets/OWNER/NAME@REVISION/data`. Its Parquet files, tars (WebDataset), loose images and lists
are read where they are, by ranges. Nothing is kept on a disk, and nothing can be written there: `hf://` is for inputs
only. The revision is a branch, a tag, a commit, `refs/pr/3` or `refs/convert/parquet`; a slash in any other is written
`%2F`, and without one it is `main`. `@~parquet` is short for `@refs/convert/parquet`, the Parquet files that the hub
makes itself of most datasets. Of a large one it makes only the first gigabytes, in folders `partial-...`, and a run
says so. The same files at two revisions are two inputs, but not at two spellings of one revision.

**Versions.** A branch moves, so a process resolves it to a commit, and lists and reads there. The version of a file is
the hash of its content: a commit that changes the card of a dataset changes no image. A file that a later commit
changes or removes is treated as in an object store: `on_changed`, `on_missing`. A process that begins later than the
commit no longer finds the listed version, and its shard waits for the next run. Name a commit to have one state for
ever.

**Access.** Set `HF_TOKEN`, or log in with `hf auth login`, on each machine that reads; `HF_ENDPOINT` names another hub
or a mirror. The token is sent to this address only, never to the hosts that it redirects to. The hub answers the same
for a private dataset as for none: both are refused, and never count as missing. Sightline's own container image sets
`HF_HUB_OFFLINE=1`; set it to 0 there.

**Limits.** The hub counts requests over five minutes, those for files apart from calls of its API, and more of them
with a token. A listing costs a call for each 1,000 names. A large file costs each process one request to the hub in ten
minutes, however many ranges it reads, so Parquet files and tars reach no limit; a loose image costs one or two. At a
limit a process waits as long as the hub says, up to five and a half minutes; if it says more, the shard waits for the
next run. A million loose images are better read from a Parquet version of them.

**Paths.** A path in a Parquet file or a list of a dataset is a path in that dataset, relative to the file's folder, or
to the dataset if it is absolute. It never names a file of the machine that reads it, because a dataset may be anyone's.
URIs with another scheme, such as `s3://`, are read as they stand.

**Measured.** `python -m benchmarks.hub`, with the stand-in of the tests on loopback: a listing of 200,000 names took
1.4 s and 2 MiB (the process grew from 52 to 54 MiB), where huggingface_hub's own file system took 7.3 s and 317 MiB;
400 MiB were read by ranges in 2.7 s, with 3 requests to the hub and 56 to the host of large files.

Sightline is tested with a stand-in for the hub's HTTP API, written after huggingface_hub's source, and not with the
hub itself."""

_IMAGE = encode(make_rgb())
_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
_INPUT = {"input": "{hub}"}


def _nothing(folder: Path) -> None:
    """The input is not in the folder."""


def _parquet(*images: dict[str, Any]) -> bytes:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"_type": "Image"}, "image_2": {"_type": "Image"}}
    table = pa.table({"image": pa.array(images, kind), "image_2": pa.array([None] * len(images), kind)})
    file = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()}), file
    )
    return file.getvalue()


def _case(kind: str, rule: str, hub: dict[str, bytes], **expected: Any) -> InputCase:
    return InputCase(kind, rule, _nothing, hub=hub, settings={**_INPUT, **expected.pop("settings", {})}, **expected)


def _refused(kind: str, rule: str, uri: str, says: str, answer: Reply | None = None) -> InputCase:
    hub = {"a.jpg": _IMAGE}
    return InputCase(kind, rule, _nothing, hub=hub, hub_answer=answer, settings={"input": uri}, refused=says)


CASES = (
    _case(
        "Parquet as `datasets` writes it, with several image columns",
        "the one that is called `image`",
        {"data/train-00000-of-00001.parquet": _parquet({"bytes": _IMAGE, "path": "a.jpg"})},
        tagged=1,
    ),
    _case(
        "images that are not in the Parquet file: `bytes` is null",
        "the path in the dataset",
        {
            "data/train.parquet": _parquet({"bytes": None, "path": "../images/a.jpg"}),
            "images/a.jpg": _IMAGE,
        },
        settings={"input": "{hub}/data"},
        tagged=1,
    ),
    _case(
        "an absolute path or `file://` in a Parquet file or a list",
        "no file of this machine: a path in the dataset",
        {
            "data/train.parquet": _parquet(
                {"bytes": None, "path": __file__}, {"bytes": None, "path": f"file://{__file__}"}
            )
        },
        rejected={"missing": 2},
    ),
    _case("a tar of samples", "as anywhere", {"000.tar": make_tar([("a.jpg", _IMAGE), ("a.json", b"{}")])}, tagged=1),
    _case(
        "names with `#`, `%20`, `?`, `@` and blanks",
        "literal",
        {"c#/a b%20c@1?.jpg": _IMAGE},
        tagged=1,
    ),
    _case(
        "a list with paths",
        "relative to its folder, in the dataset",
        {"list.csv": b"path\nimages/a.jpg\nimages/none.jpg\n", "images/a.jpg": _IMAGE},
        settings={"input": "{hub}/list.csv"},
        tagged=1,
        rejected={"missing": 1},
    ),
    _case(
        "a pointer of Git LFS that was committed in place of the image",
        "the detail says so",
        {"a.jpg": _POINTER, "b.jpg": _IMAGE},
        tagged=1,
        rejected={"not_an_image": 1},
    ),
    _case(
        "`README.md`, `.gitattributes`",
        "as other files",
        {"README.md": b"# Images", ".gitattributes": b"", "a.jpg": _IMAGE},
        tagged=1,
        skipped={".md files": 1, "hidden files": 1},
    ),
    _refused(
        "`hf://OWNER/NAME`, and models, spaces, buckets",
        "write `hf://datasets/OWNER/NAME`",
        "hf://owner/name",
        "write hf://datasets/owner/name",
    ),
    _refused(
        "a dataset without an owner",
        "datasets such as `mnist` have one now",
        "hf://datasets/mnist",
        "write hf://datasets/OWNER/NAME",
    ),
    _refused(
        "a dataset that does not exist, or is private",
        "check its name, or set `HF_TOKEN`",
        "hf://datasets/owner/none",
        "or it is private",
    ),
    _refused(
        "a gated dataset",
        "ask for access on its page",
        "{hub}",
        "gated: ask for access",
        refuse(403, "GatedRepo", "Access is restricted"),
    ),
    _refused(
        "a token that has expired",
        "set `HF_TOKEN` to a new one",
        "{hub}",
        "set HF_TOKEN to a new one",
        refuse(401, "", "Invalid credentials in Authorization header"),
    ),
    _refused(
        "a revision that does not exist", "see the branches and tags of the dataset", "{hub}@none", "no such revision"
    ),
    _refused(
        "an empty dataset or folder", "as an empty prefix", "{hub}/none", "no image, tar or Parquet file under hf://"
    ),
    InputCase(
        "an output at `hf://`",
        "inputs only",
        _nothing,
        hub={"a.jpg": _IMAGE},
        settings={"input": "{hub}", "output": "{hub}/tags"},
        refused="for inputs only",
    ),
)
