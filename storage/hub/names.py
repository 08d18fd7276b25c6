"""Names on the hub: URIs to a dataset, a revision of it, and a path in it."""

from __future__ import annotations

import os
import posixpath
import re
from typing import NamedTuple
from urllib.parse import quote

from storage.store import InvalidUri, show

EXAMPLE = "hf://datasets/OWNER/NAME[@REVISION][/PATH]"
DEFAULT_REVISION = "main"
_SHORT = {"~parquet": "refs/convert/parquet"}
"""Short forms of revisions: the Parquet files that the hub makes itself of a dataset."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PARTIAL = re.compile(r"hf://[^@]+@(?:~parquet|refs/convert/parquet|refs%2Fconvert%2Fparquet)/[^/]+/partial-[^/]+/")
_DATASET = r"(hf://datasets/[^/@]+/[^/@]+)"
_MAIN = re.compile(rf"^{_DATASET}@{DEFAULT_REVISION}(?=/|$)")
_PARQUET = re.compile(rf"^{_DATASET}@refs(?:/|%2[Ff])convert(?:/|%2[Ff])parquet(?=/|$)")
_PATH_BYTES = 4096


class Place(NamedTuple):
    """Where a URI points: a dataset's `repo` (`OWNER/NAME`), a `revision`, and a `path`, which may be empty.

    `root` is the URI of the dataset with its revision as it was written, without a slash at its end. The URI of a file
    is `root`, a slash, and its path in the dataset.
    """

    repo: str
    revision: str
    path: str
    root: str

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a whole commit hash, which never names anything else."""
        return bool(_COMMIT.fullmatch(self.revision))


def split_uri(uri: str) -> Place:
    """Split a URI. A path is literal, and slashes at its end do not count. In a revision `%2F` stands for a slash.

    Raises `InvalidUri` for what is no dataset, and for a path that no file of a Git repository can have.
    """
    from huggingface_hub.errors import HfUriError
    from huggingface_hub.utils import parse_hf_uri

    try:
        uri.encode()
    except UnicodeEncodeError:
        raise InvalidUri(f"{show(uri)}: a name is UTF-8") from None
    try:
        found = parse_hf_uri(uri)
    except HfUriError as error:
        raise InvalidUri(f"{show(uri)}: {show(error.msg.strip().rstrip('.'))}: write {EXAMPLE}") from None
    if found.type != "dataset":
        names_kind = uri.startswith(f"hf://{found.type}s/")
        wanted = EXAMPLE if names_kind else f"hf://datasets/{show(found.id)}"
        raise InvalidUri(f"{show(uri)}: only datasets of the hub can be read: write {wanted}")
    path = found.path_in_repo
    whole = uri.rstrip("/")
    root = whole[: len(whole) - len(path) - 1] if path else whole
    if path and f"{root}/{path}" != whole:
        raise InvalidUri(f"{show(uri)}: write {EXAMPLE}, and %2F for a slash in a revision")
    parts = path.split("/") if path else []
    if len(path.encode()) > _PATH_BYTES or "\0" in path or not {"", ".", ".."}.isdisjoint(parts):
        raise InvalidUri(f"{show(uri)}: no file of a dataset has such a path")
    revision = found.revision or DEFAULT_REVISION
    return Place(found.id, _SHORT.get(revision, revision), path, root)


def use_one_spelling(uri: str) -> str:
    """A URI with the shortest spelling of its revision: none for `main`, `~parquet` for `refs/convert/parquet`.

    The same files are then one input, however a revision is written. Other URIs are returned unchanged.
    """
    return _PARQUET.sub(r"\1@~parquet", _MAIN.sub(r"\1", uri))


def split_file(uri: str) -> Place:
    """Split the URI of a file. Raises `InvalidUri`, also for a whole dataset, or for a folder."""
    place = split_uri(uri)
    if not place.path or uri.endswith("/"):
        raise InvalidUri(f"{show(uri)} names a {'folder' if place.path else 'dataset'}, not a file")
    return place


def resolve_path(uri: str, listed_in: str) -> str:
    """The URI of a file that a file of a dataset names by a path: always in that dataset, at that revision.

    A relative path is relative to the folder of `listed_in`, an absolute one, also with `file://`, to the dataset. So a
    dataset, which may be anyone's, names no file of this machine. Names on the hub have no `.` or `..`, so these lead
    to other folders.
    """
    place = split_uri(listed_in)
    folder = posixpath.dirname(place.path)
    path = uri.removeprefix("file://")
    return place.root + posixpath.normpath(path if path.startswith("/") else f"/{folder}/{path}").replace("//", "/", 1)


def is_partial(uri: str) -> bool:
    """Tell whether a file is of a split of which the hub converted only the first gigabytes to Parquet."""
    return bool(_PARTIAL.match(uri))


def make_page_url(uri: str) -> str:
    """The URL of a file on the hub that a browser can open."""
    place = split_file(uri)
    return make_file_url(read_endpoint(), place.repo, place.revision, place.path)


def read_endpoint() -> str:
    """The address of the hub: `HF_ENDPOINT`, or huggingface_hub's own, without a slash at its end."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def make_file_url(endpoint: str, repo: str, revision: str, path: str) -> str:
    """The URL of a file on the hub at this address."""
    return f"{endpoint}/datasets/{repo}/resolve/{quote(revision, safe='')}/{quote(path)}"


def make_api_url(endpoint: str, repo: str, call: str, revision: str, path: str = "") -> str:
    """The URL of a call of the hub's API about a dataset's revision, and perhaps a path in it."""
    end = f"/{quote(path, safe='')}" if path else ""
    return f"{endpoint}/api/datasets/{repo}/{call}/{quote(revision, safe='')}{end}"
