"""Errors of the stores: for every name and every error of the disk, one line and the right subclass."""

from __future__ import annotations

import errno
import io
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from urllib3.response import HTTPResponse

from pipelines.config import JobConfig
from storage.s3.names import split_object
from storage.s3.store import S3Store
from storage.schemes import open_store
from storage.store import (
    Changed,
    Entry,
    Forbidden,
    InvalidUri,
    LinkNotFollowed,
    NoSpace,
    NotFound,
    Store,
    StoreError,
    StoreOptions,
    Unreachable,
    join,
    show,
)

PIECES = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(categories=["Cs", "Cc", "Zs", "Zl", "Mn"]), max_size=5),
    st.sampled_from(
        ["..", ".", "", "\0", "\udc80", "\ud800", "x" * 300, "ü" * 600, "%00", "UPPER_case!", "arn:aws:s3"]
    ),
)
NAMES = st.lists(PIECES, max_size=6).map("/".join)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> StoreOptions:
    """Options of an S3 endpoint that refuses connections."""
    monkeypatch.setattr("storage.retry.PAUSE_SECONDS", 0)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_EC2_METADATA_DISABLED": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return StoreOptions(f"http://127.0.0.1:{held.getsockname()[1]}", "us-east-1")


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces fsync, so that tests do not wait for the disk."""
    monkeypatch.setattr("storage.local.os.fsync", lambda _: None)


def every_method(store: Store, uri: str) -> Iterator[Callable[[], Any]]:
    yield lambda: store.stat(uri)
    yield lambda: store.read(uri)
    yield lambda: store.read(uri, 3, 9, "etag")
    yield lambda: store.put(uri, b"data")
    yield lambda: store.put_if_absent(uri, b"data")
    yield lambda: store.put_if_absent(uri, b"other")
    yield lambda: list(store.list(uri))
    yield lambda: list(store.names(uri))
    yield lambda: list(store.names("s3://bucket", uri))
    yield lambda: store.delete(uri)


def check_names(uri: str, options: StoreOptions) -> None:
    try:
        store = open_store(uri, options)
    except InvalidUri:
        return
    for method in every_method(store, uri):
        try:
            method()
        except StoreError as error:
            message = str(error)
            assert len(message.splitlines()) == 1, message
            assert message.encode(), "can be written to a log"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES)
def test_any_name_on_a_disk(tmp_path: Path, quick_disk: None, name: str) -> None:
    # In a nested folder, because '..' in a name may leave it: the folders above are the test's too.
    folder = tmp_path / "a/b/c/d/e/f/g"
    folder.mkdir(parents=True, exist_ok=True)
    check_names(f"{folder}/{name}", StoreOptions())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(uri=st.one_of(NAMES.map("s3://".__add__), NAMES.map("s3://bucket/".__add__), NAMES.map("x://".__add__)))
def test_any_name_on_s3(refusing: StoreOptions, uri: str) -> None:
    check_names(uri, refusing)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    uri=st.one_of(
        NAMES.map("hf://".__add__), NAMES.map("hf://datasets/".__add__), NAMES.map("hf://datasets/owner/name@".__add__)
    )
)
def test_any_name_on_the_hub(refusing: StoreOptions, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", str(refusing.endpoint))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    check_names(uri, refusing)


@pytest.mark.parametrize("name", ["", "file://", "a\0b", "\ud800", "x" * 300, "abfs://bucket/a", "http://host/a.jpg"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidUri):
        open_store(name).read(name)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://",
        "s3:///x",
        "s3://UPPER_case!/x",
        "s3://b/a\0b",
        "s3://b/\ud800",
        "s3://b/" + "x" * 1025,
        "s3://b/../c",
        "s3://b",
        "s3://arn:aws:s3:::bucket/key",
        "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/",
        "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/name",
        "s3://arn:aws:s3:eu-west-1:12345:accesspoint/name/key",
        "s3://arn:aws:iam::123456789012:role/name/key",
        "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/name:x/key",
    ],
)
def test_names_that_no_s3_object_can_have(uri: str, refusing: StoreOptions) -> None:
    with pytest.raises(InvalidUri):
        open_store(uri, refusing).read(uri)


ACCOUNT = "123456789012"
ACCESS_POINTS = {
    f"arn:aws:s3:eu-west-1:{ACCOUNT}:accesspoint/name": f"name-{ACCOUNT}.s3-accesspoint.eu-west-1.amazonaws.com",
    f"arn:aws:s3:eu-west-1:{ACCOUNT}:accesspoint:name": f"name-{ACCOUNT}.s3-accesspoint.eu-west-1.amazonaws.com",
    f"arn:aws:s3-object-lambda:us-east-1:{ACCOUNT}:accesspoint/name": (
        f"name-{ACCOUNT}.s3-object-lambda.us-east-1.amazonaws.com"
    ),
    f"arn:aws:s3-outposts:us-west-2:{ACCOUNT}:outpost/op-01234567890123456/accesspoint/name": (
        f"name-{ACCOUNT}.op-01234567890123456.s3-outposts.us-west-2.amazonaws.com"
    ),
    "name-metadata-s3alias": "name-metadata-s3alias.s3.amazonaws.com",
}


@pytest.mark.parametrize("bucket", ACCESS_POINTS)
def test_access_points_stand_in_place_of_a_bucket(
    bucket: str, refusing: StoreOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each operation asks for the key below the access point, and a listing names objects as they were asked for."""
    sent: list[tuple[str, str, str]] = []
    listing = (
        "<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>in/a.jpg</Key><Size>3</Size>"
        '<ETag>"e"</ETag></Contents></ListBucketResult>'
    )

    def answer(request: AWSPreparedRequest, **_: Any) -> AWSResponse:
        url = urlsplit(request.url)
        sent.append((request.method, url.netloc, url.path))
        body, headers = b"", {"ETag": '"e"', "Content-Length": "3" if request.method == "HEAD" else "0"}
        if request.method == "GET":
            body = listing.encode() if "list-type" in url.query else b"abc"
            headers |= {"Content-Range": "bytes 0-2/3", "Content-Length": str(len(body))}
        raw = HTTPResponse(io.BytesIO(body), headers=headers, preload_content=False, request_method=request.method)
        return AWSResponse(request.url, 200, headers, raw)

    store = S3Store(StoreOptions(None, "us-east-1"))
    store._client.meta.events.register("before-send.s3", answer)
    uri = f"s3://{bucket}/in/a.jpg"
    assert list(store.list(f"s3://{bucket}/in")) == [Entry(uri, 3, "e")]
    assert store.stat(uri) == Entry(uri, 3, "e")
    assert store.read(uri, etag="e") == b"abc"
    assert store.put(uri, b"abc") == Entry(uri, 3, "e")
    assert store.put_if_absent(uri, b"abc")
    host = ACCESS_POINTS[bucket]
    assert sent == [("GET", host, "/"), *((method, host, "/in/a.jpg") for method in ("HEAD", "GET", "PUT", "PUT"))]


def test_an_access_point_for_several_regions_names_what_to_install(refusing: StoreOptions) -> None:
    uri = f"s3://arn:aws:s3::{ACCOUNT}:accesspoint/mfzwi23gnjvgw.mrap/in/a.jpg"
    assert split_object(uri) == (f"arn:aws:s3::{ACCOUNT}:accesspoint/mfzwi23gnjvgw.mrap", "in/a.jpg")
    with pytest.raises(StoreError, match=r"botocore\[crt\]|cannot reach"):
        S3Store(refusing).read(uri)


def test_an_endpoint_that_refuses_is_named(refusing: StoreOptions) -> None:
    store = open_store("s3://bucket/a", refusing)
    with pytest.raises(Unreachable, match=r"s3://bucket/a: cannot reach S3 at http://127.* check AWS_ENDPOINT_URL"):
        store.read("s3://bucket/a")


@pytest.mark.parametrize("endpoint", ["nonsense", "http://[::1", "http://a b/"])
def test_an_invalid_endpoint(endpoint: str) -> None:
    with pytest.raises(StoreError):
        open_store("s3://bucket/a", StoreOptions(endpoint)).read("s3://bucket/a")


def test_a_message_is_one_line_of_bounded_length() -> None:
    assert show("a\nb\u2028\udc80\x00ü") == "a\\nb\\u2028\\udc80\\x00ü"
    assert len(show("x" * 10_000)) < 500


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOENT, NotFound),
        (errno.ENOTDIR, NotFound),
        (errno.EISDIR, NotFound),
        (errno.EACCES, Forbidden),
        (errno.EPERM, Forbidden),
        (errno.ELOOP, LinkNotFollowed),
        (errno.ENAMETOOLONG, InvalidUri),
        (errno.EIO, Unreachable),
        (errno.ESTALE, Unreachable),
        (errno.ENOTCONN, Unreachable),
        (errno.ETIMEDOUT, Unreachable),
        (errno.EMFILE, StoreError),
    ],
)
def test_errors_of_a_disk_by_number(
    number: int, kind: type[StoreError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("storage.local.os.open", fail)
    with pytest.raises(kind) as caught:
        open_store(str(tmp_path)).read(str(tmp_path / "a"))
    assert type(caught.value) is kind
    assert str(tmp_path / "a") in str(caught.value)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("storage.local.os.fsync", full)
    with pytest.raises(NoSpace, match="no space left"):
        open_store(str(tmp_path)).put(str(tmp_path / "a"), b"data")
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_read_are_listed_without_a_size(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
    store = open_store(str(tmp_path))
    found = {entry.uri.rpartition("/")[2]: entry for entry in store.list(str(tmp_path))}
    assert found.pop("a.jpg").size == 1
    assert set(found) == {"dangling.jpg", "pipe.jpg", "socket.jpg"}
    for name, entry in found.items():
        assert entry == Entry(str(tmp_path / name), -1, "")
        assert store.stat(entry.uri) is None
        with pytest.raises((NotFound, StoreError)):  # and does not wait for a writer
            store.read(entry.uri)


@pytest.mark.parametrize("where", ["in the folder", "the folder itself"])
def test_a_symbolic_link_to_itself_is_refused(where: str, tmp_path: Path) -> None:
    link = tmp_path / "link.jpg"
    link.symlink_to(link)
    store = open_store(str(tmp_path))
    with pytest.raises(InvalidUri, match=r"link\.jpg: .*symbolic links"):
        list(store.list(str(tmp_path if where == "in the folder" else link)))
    with pytest.raises(InvalidUri):
        store.stat(str(link))


def test_a_folder_without_read_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    real = os.listdir

    def listdir(folder: str) -> list[str]:
        if folder.endswith("closed"):  # simulated, because a test that runs as root may read every folder
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(folder)

    monkeypatch.setattr("storage.local.os.listdir", listdir)
    with pytest.raises(Forbidden, match="closed"):
        list(open_store(str(tmp_path)).list(str(tmp_path)))


def test_folders_nested_deeper_than_the_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    depth = 1500
    for _ in range(depth):
        os.mkdir("a")
        os.chdir("a")
    Path("x.jpg").write_bytes(b"x")
    os.chdir(tmp_path)
    found = [entry.uri for entry in open_store("a").list("a")]
    subprocess.run(["rm", "-r", "a"], check=True)  # pytest's own clean-up cannot remove it
    assert found == ["a/" * depth + "x.jpg"]


def test_reads_beyond_the_end_and_changes(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    entry = store.put(str(tmp_path / "a"), b"0123456789")
    assert store.read(entry.uri, 4, 1 << 60, entry.etag) == b"456789"
    assert store.read(entry.uri, 10, 20) == store.read(entry.uri, 50) == b""
    os.truncate(entry.uri, 5)
    with pytest.raises(Changed):
        store.read(entry.uri, 0, 10, entry.etag)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_hard_links(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("storage.local.os.link", link)
    store, uri = open_store(str(tmp_path)), str(tmp_path / "commits/a.json")
    assert store.put_if_absent(uri, b"mine")
    assert store.put_if_absent(uri, b"mine")
    assert not store.put_if_absent(uri, b"theirs")
    assert store.read(uri) == b"mine"
    assert [entry.uri for entry in store.list(str(tmp_path))] == [uri]
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())  # and no rename that never replaces a file
    with pytest.raises(StoreError, match="has neither hard links nor renames"):
        store.put_if_absent(str(tmp_path / "b"), b"mine")


def test_the_longest_names_are_written(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for name in ("x" * 255, "ü" * 127):
        assert store.put_if_absent(join(str(tmp_path), name), b"a")


@pytest.mark.parametrize("uri", ["s3://", "gs://", "az:///", "hf:datasets/owner/name", "s3:/bucket/tags", "GS:bucket"])
def test_a_part_of_a_uri_is_no_folder_of_this_machine(uri: str) -> None:
    """`s3://$BUCKET` with a variable that is not set: the job wrote into a folder `s3:`, with exit code 0."""
    for keys in ({"input": "photos", "output": uri}, {"input": uri, "output": "tags"}):
        with pytest.raises(ValueError, match=r"there is no bucket behind|for a folder of this name"):
            JobConfig.model_validate({"labels": ["cat"], **keys})
    config = JobConfig.model_validate({"labels": ["cat"], "input": "a:b", "output": "./s3:tags"})
    assert config.output.endswith("/s3:tags")
