"""Stores: the same behaviour on a local disk and on S3."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.files import StoreFile
from storage.local import LocalStore
from storage.schemes import open_store
from storage.store import Changed, Forbidden, NotFound, Store, StoreError, StoreOptions, join
from tests.support.stores.azurite import Azurite
from tests.support.stores.google_server import GoogleServer
from tests.support.stores.radosgw import Radosgw

NAMES = ["plain.jpg", "a folder/with space.jpg", "hash#100%25 %.jpg", "umlaut ü – 東京.png", "a+b=c&d.jpg"]


@pytest.fixture(
    params=["local", pytest.param("s3", marks=pytest.mark.s3), "gs", pytest.param("az", marks=pytest.mark.azure)]
)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, str]:
    """A store and an empty folder in it."""
    if request.param == "local":
        return open_store(str(tmp_path)), str(tmp_path / "root")
    fixture = {"s3": "s3", "gs": "google", "az": "azurite"}[request.param]
    server: Radosgw | GoogleServer | Azurite = request.getfixturevalue(fixture)
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    root = f"{request.param}://{server.new_bucket()}/root"
    return open_store(root, StoreOptions(server.endpoint, "us-east-1")), root


def test_names_are_literal(place: tuple[Store, str]) -> None:
    store, root = place
    for name in NAMES:
        store.put(join(root, name), name.encode())
    found = {entry.uri.removeprefix(root + "/"): entry for entry in store.list(root)}
    assert set(found) == set(NAMES)
    for name, entry in found.items():
        assert store.read(entry.uri, etag=entry.etag) == name.encode()
        assert store.stat(entry.uri) == entry


def test_put_if_absent_has_one_winner(place: tuple[Store, str]) -> None:
    store, root = place
    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(lambda n: store.put_if_absent(join(root, "commit.json"), b"%d" % n), range(8)))
    assert wins.count(True) == 1
    assert store.read(join(root, "commit.json")) == b"%d" % wins.index(True)
    # A second write of the same content looks like a retried request, and counts as successful.
    assert store.put_if_absent(join(root, "commit.json"), b"%d" % wins.index(True))


@pytest.mark.parametrize("put", [LocalStore.put, LocalStore.put_if_absent])
def test_a_temporary_file_that_is_removed_is_written_again(
    put: Callable[[LocalStore, str, bytes], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends removes what looks like a killed run's temporary file, and then its empty folder."""
    synced = 0
    sync = os.fsync

    def remove_file(descriptor: int) -> None:
        nonlocal synced
        sync(descriptor)
        synced += 1
        if synced <= 3:
            shutil.rmtree(tmp_path / "parts")

    monkeypatch.setattr(os, "fsync", remove_file)
    store, path = LocalStore(), tmp_path / "parts/shard/0.arrow"
    assert put(store, str(path), b"rows")
    assert synced == 4
    assert path.read_bytes() == b"rows"
    assert os.listdir(path.parent) == ["0.arrow"]


def test_put_returns_the_stored_entry(place: tuple[Store, str]) -> None:
    store, root = place
    entry = store.put(join(root, "object"), b"data")
    assert store.stat(entry.uri) == entry
    assert list(store.list(root)) == [entry]


def test_ranges_and_changed_objects(place: tuple[Store, str]) -> None:
    store, root = place
    entry = store.put(join(root, "object"), bytes(range(100)))
    assert store.read(entry.uri, 10, 20, entry.etag) == bytes(range(10, 20))
    store.put(entry.uri, bytes(range(100, 200)))  # of the same size
    with pytest.raises(Changed):
        store.read(entry.uri, 0, 5, entry.etag)
    store.delete(entry.uri)
    store.delete(entry.uri)
    assert store.stat(entry.uri) is None
    with pytest.raises(NotFound):
        store.read(entry.uri)


def test_a_prefix_is_a_folder(place: tuple[Store, str]) -> None:
    store, root = place
    store.put(join(root, "images/a.jpg"), b"a")
    store.put(join(root, "images2/b.jpg"), b"b")
    assert [entry.uri for entry in store.list(join(root, "images"))] == [join(root, "images/a.jpg")]


def test_names_are_those_directly_in_a_folder(place: tuple[Store, str]) -> None:
    store, root = place
    for name in ("a-1.json", "a-2.json", "b %.json", "deeper/a-3.json"):
        store.put(join(root, name), b"x")
    assert sorted(store.names(root)) == sorted(store.names(f"{root}/")) == ["a-1.json", "a-2.json", "b %.json"]
    assert sorted(store.names(root, "a-")) == ["a-1.json", "a-2.json"]
    assert list(store.names(root, "b %")) == ["b %.json"]
    assert list(store.names(join(root, "deeper"))) == ["a-3.json"]
    for folder, start in (
        (root, "deeper/"),
        (root, "deeper/a"),
        (join(root, "none"), ""),
        (join(root, "a-1.json"), ""),
    ):
        assert list(store.names(folder, start)) == []


@pytest.mark.s3
def test_names_of_many_objects_and_of_no_bucket(s3_env: Radosgw, monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"s3://{s3_env.new_bucket()}/root"
    store = open_store(root, StoreOptions(s3_env.endpoint, "us-east-1"))
    names = {f"{number}.json" for number in range(1003)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put(join(root, name), b""), names))
    s3_env.client().put_object(Bucket=root.split("/")[2], Key="root/", Body=b"")  # as consoles show a folder
    assert sorted(store.names(root)) == sorted(names)
    with pytest.raises(NotFound, match="no such bucket"):
        list(store.names("s3://no-such-bucket-here/prefix"))


def test_names_on_a_disk_include_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / ".a.tmp").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked").symlink_to(tmp_path / "folder")
    assert sorted(LocalStore().names(str(tmp_path))) == [".a.tmp", "dangling", "linked", "pipe"]


def test_a_stored_file_reads_and_seeks(place: tuple[Store, str]) -> None:
    store, root = place
    content = bytes(n % 251 for n in range(100_000))
    entry = store.put(join(root, "object"), content)
    with io.BufferedReader(StoreFile(store, entry, chunk_bytes=7000), 512) as file:
        assert file.read() == content
        file.seek(-10, io.SEEK_END)
        assert file.read() == content[-10:]
        file.seek(12_345)
        assert file.read(20_000) == content[12_345:32_345]


@pytest.mark.s3
def test_errors_say_what_to_change(s3_env: Radosgw, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("s3://x", StoreOptions(s3_env.endpoint, "us-east-1"))
    with pytest.raises(NotFound, match="no such bucket"):
        list(store.list("s3://no-such-bucket-here/prefix"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    other = open_store("s3://x", StoreOptions(s3_env.endpoint, "eu-west-1"))
    with pytest.raises(Forbidden, match="check the credentials"):
        list(other.list(f"s3://{s3_env.new_bucket()}/"))


@pytest.mark.parametrize("uri", ["http://host/a.jpg", "abfs://container/a"])
def test_other_stores_are_refused(uri: str) -> None:
    with pytest.raises(StoreError, match="only local paths and s3://, gs://, az:// and hf://"):
        open_store(uri)


def test_a_symlink_loop_ends(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(b"a")
    (tmp_path / "images/again").symlink_to(tmp_path / "images")
    (tmp_path / "images/dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    find: Callable[[], list[str]] = lambda: [e.uri for e in open_store(str(tmp_path)).list(str(tmp_path))]  # noqa: E731
    assert find() == [str(tmp_path / "images/a.jpg"), str(tmp_path / "images/dangling.jpg")]
