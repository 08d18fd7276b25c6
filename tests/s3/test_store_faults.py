"""The S3 store behind a proxy that injects faults: retries, errors, and reads that are never cut short."""

from __future__ import annotations

import hashlib
import io
import random
import time
from collections.abc import Iterator
from itertools import islice

import pytest

from storage.files import StoreFile
from storage.s3 import store as s3_module
from storage.s3 import uploads as s3_uploads
from storage.s3.store import S3Store
from storage.store import ATTEMPTS, Changed, Forbidden, NotFound, StoreError, StoreOptions, Unreachable, join
from tests.support.stores import fault_proxy as faults
from tests.support.stores.fault_proxy import (
    Action,
    CutShort,
    ErrorResponse,
    FaultProxy,
    Reset,
    Silence,
    Trickle,
    fault_proxy,
)
from tests.support.stores.radosgw import Radosgw

pytestmark = pytest.mark.s3

DATA = random.Random(7).randbytes(3_000_000)
MIDDLE = 1_234_567


@pytest.fixture(scope="module")
def bucket(s3: Radosgw) -> str:
    return f"s3://{s3.new_bucket()}"


@pytest.fixture(scope="module")
def running(s3: Radosgw) -> Iterator[FaultProxy]:
    with fault_proxy(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(running: FaultProxy, s3_env: Radosgw, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    monkeypatch.setattr("storage.retry.PAUSE_SECONDS", 0.01)
    running.clear()
    return running


@pytest.fixture
def store(proxy: FaultProxy) -> S3Store:
    return S3Store(StoreOptions(proxy.endpoint, "us-east-1"))


@pytest.fixture
def impatient(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """A store that ends an attempt after one second of silence."""
    monkeypatch.setattr("storage.s3.store.READ_SECONDS", 1.0)
    return S3Store(StoreOptions(proxy.endpoint, "us-east-1"))


@pytest.mark.parametrize(
    "action",
    [
        faults.FAILS,
        faults.SLOW_DOWN,
        ErrorResponse(400, "RequestTimeout"),
        ErrorResponse(429, "TooManyRequests"),
        Reset(),
        Reset(0),
        Reset(MIDDLE),
        CutShort(MIDDLE),
        CutShort(0),
        CutShort(MIDDLE, lying=True),
        CutShort(0, lying=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("asked", ["all", "range", "listed"])
def test_a_read_returns_all_bytes(proxy: FaultProxy, store: S3Store, bucket: str, action: Action, asked: str) -> None:
    entry = store.put(join(bucket, "read/object"), DATA)
    rule = proxy.add(action, "read/object", times=ATTEMPTS - 1)
    if asked == "all":
        assert store.read(entry.uri) == DATA
    elif asked == "range":
        assert store.read(entry.uri, 100, 2_900_000, entry.etag) == DATA[100:2_900_000]
    else:
        assert store.read(entry.uri, 0, entry.size, entry.etag) == DATA
    assert rule.done >= 1


def test_a_read_is_resumed_where_it_ended(proxy: FaultProxy, store: S3Store, bucket: str) -> None:
    entry = store.put(join(bucket, "resumed"), DATA)
    rule = proxy.add(CutShort(700_000), "resumed", times=4)  # only several attempts together get all bytes
    assert store.read(entry.uri) == DATA
    assert rule.done == 4


@pytest.mark.parametrize("action", [faults.FAILS, Reset(1000), CutShort(0), CutShort(1, lying=True)], ids=str)
def test_a_read_that_never_succeeds(proxy: FaultProxy, store: S3Store, bucket: str, action: Action) -> None:
    entry = store.put(join(bucket, "never"), DATA)
    rule = proxy.add(action, "never", times=None)
    with pytest.raises(Unreachable, match="/never"):
        store.read(entry.uri, 0, entry.size, entry.etag)
    assert rule.done == ATTEMPTS


def test_silence_ends_an_attempt(proxy: FaultProxy, impatient: S3Store, bucket: str) -> None:
    entry = impatient.put(join(bucket, "silent"), DATA)
    for after in (None, 0, MIDDLE):
        rule = proxy.add(Silence(30, after), "silent")
        begun = time.monotonic()
        assert impatient.read(entry.uri, 0, entry.size, entry.etag) == DATA
        assert rule.done == 1
        assert time.monotonic() - begun < 5
    proxy.add(Silence(30), "silent", method="GET|HEAD|LIST|PUT", times=None)
    begun = time.monotonic()
    with pytest.raises(Unreachable, match="was silent"):
        impatient.read(entry.uri)
    assert time.monotonic() - begun < 2 * ATTEMPTS


def test_thirty_seconds_of_silence(proxy: FaultProxy, store: S3Store, bucket: str) -> None:
    entry = store.put(join(bucket, "silent"), DATA)
    rule = proxy.add(Silence(30, MIDDLE), "silent")
    begun = time.monotonic()
    assert store.read(entry.uri, 0, entry.size, entry.etag) == DATA
    assert rule.done == 1
    assert 15 < time.monotonic() - begun < 28  # read again before the silence ended


def test_a_trickle_ends_an_attempt_and_a_slow_line_does_not(proxy: FaultProxy, impatient: S3Store, bucket: str) -> None:
    entry = impatient.put(join(bucket, "slow"), DATA[:60_000])
    rule = proxy.add(Trickle(2_000), "slow")
    begun = time.monotonic()
    assert impatient.read(entry.uri) == DATA[:60_000]
    assert rule.done == 1
    assert time.monotonic() - begun < 5
    rule = proxy.add(Trickle(20_000), "slow", times=None)
    begun = time.monotonic()
    assert impatient.read(entry.uri) == DATA[:60_000]
    assert rule.done == 1
    assert time.monotonic() - begun > 2


def test_an_object_that_is_replaced_during_a_read(proxy: FaultProxy, store: S3Store, bucket: str) -> None:
    uri = join(bucket, "replaced")
    entry = store.put(uri, DATA)

    class Replacing(S3Store):
        """Replaces the object between the first and the second attempt."""

        def _retry(self, uri, once):  # type: ignore[no-untyped-def]
            def replacing():  # type: ignore[no-untyped-def]
                try:
                    return once()
                except Unreachable:
                    store.put(uri, DATA[::-1])
                    raise

            return super()._retry(uri, replacing)

    proxy.add(CutShort(MIDDLE), "replaced")
    other = Replacing(StoreOptions(proxy.endpoint, "us-east-1"))
    assert other.read(uri) == DATA[::-1]  # one version or the other, never a mixture
    store.put(uri, DATA)
    proxy.add(CutShort(MIDDLE), "replaced")
    with pytest.raises(Changed):
        other.read(uri, 0, entry.size, entry.etag)


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        (faults.FORBIDDEN, Forbidden),
        (faults.ARCHIVED, Forbidden),
        (faults.ABSENT, NotFound),
        (faults.PRECONDITION, Changed),
    ],
    ids=str,
)
def test_permanent_errors_are_not_retried(
    proxy: FaultProxy, store: S3Store, bucket: str, action: Action, kind: type[StoreError]
) -> None:
    entry = store.put(join(bucket, "refused"), DATA)
    rule = proxy.add(action, "refused")
    with pytest.raises(kind, match=r"s3://.*/refused"):
        store.read(entry.uri, 0, entry.size, entry.etag)
    assert rule.done == 1
    assert store.read(entry.uri) == DATA


def test_an_end_that_only_one_response_claims(proxy: FaultProxy, store: S3Store, bucket: str) -> None:
    entry = store.put(join(bucket, "end"), DATA)
    rule = proxy.add(ErrorResponse(416, "InvalidRange"), "end", times=2)
    assert store.read(entry.uri, 0, entry.size, entry.etag) == DATA
    assert rule.done == 2
    assert store.read(entry.uri, entry.size, entry.size + 10, entry.etag) == b""
    assert store.read(entry.uri, entry.size - 5, 1 << 50) == DATA[-5:]
    assert store.read(store.put(join(bucket, "empty"), b"").uri) == b""


@pytest.mark.parametrize(
    "action",
    [
        faults.FAILS,
        faults.SLOW_DOWN,
        Reset(),
        Reset(40),
        CutShort(40),
        CutShort(40, lying=True),
        CutShort(0, lying=True),
    ],
    ids=str,
)
def test_an_incomplete_listing_raises(proxy: FaultProxy, store: S3Store, bucket: str, action: Action) -> None:
    names = {join(bucket, "many", f"{n:04d}") for n in range(1003)}
    if len(list(store.list(join(bucket, "many")))) < len(names):
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: store.put(name, b"x"), names))
    rule = proxy.add(action, "/many/", method="LIST", skip=1, times=2)
    assert {entry.uri for entry in store.list(join(bucket, "many"))} == names
    assert rule.done == 2
    rule = proxy.add(action, "/many/", method="LIST", skip=1, times=None)
    listing = store.list(join(bucket, "many"))
    assert len(list(islice(listing, 1000))) == 1000
    with pytest.raises(Unreachable):
        next(listing)


@pytest.mark.parametrize("action", [faults.FAILS, faults.DONE_BUT_FAILS, Reset()], ids=str)
def test_writes_are_retried(proxy: FaultProxy, store: S3Store, bucket: str, action: Action) -> None:
    uri = join(bucket, "written", str(action))
    rule = proxy.add(action, "/written/", method="PUT", times=2)
    entry = store.put(uri, DATA)
    assert rule.done == 2
    assert store.stat(uri) == entry
    assert store.read(uri) == DATA
    rule = proxy.add(action, "/written/", method="PUT", times=None)
    with pytest.raises(Unreachable):
        store.put(uri, DATA)
    assert rule.done == ATTEMPTS
    proxy.clear()
    rule = proxy.add(action, "/written/", method="DELETE", times=2)
    store.delete(uri)
    assert rule.done == 2
    assert store.stat(uri) is None


@pytest.mark.parametrize(
    "action", [faults.FAILS, faults.DONE_BUT_FAILS, faults.CONFLICT, faults.PRECONDITION, Reset()], ids=str
)
def test_put_if_absent_recognises_its_own_write(proxy: FaultProxy, store: S3Store, bucket: str, action: Action) -> None:
    uri = join(bucket, "commits", f"{action}.json")
    rule = proxy.add(action, "/commits/", method="PUT", times=3, conditional=True)
    assert store.put_if_absent(uri, b"ours")
    assert rule.done == 3
    assert store.read(uri) == b"ours"
    proxy.add(action, "/commits/", method="PUT", times=1)
    assert not store.put_if_absent(uri, b"theirs")
    assert store.read(uri) == b"ours"


def test_put_if_absent_gives_up(proxy: FaultProxy, store: S3Store, bucket: str) -> None:
    uri = join(bucket, "commits/never.json")
    for action in (faults.CONFLICT, faults.PRECONDITION, faults.FAILS):
        rule = proxy.add(action, "never.json", method="PUT", times=None, conditional=True)
        with pytest.raises(Unreachable, match=r"never\.json"):
            store.put_if_absent(uri, b"ours")
        assert rule.done == ATTEMPTS
        rule.stop()
    assert store.stat(uri) is None
    rule = proxy.add(ErrorResponse(501, "NotImplemented"), "never.json", method="PUT")
    with pytest.raises(StoreError, match="does not support the request"):
        store.put_if_absent(uri, b"ours")


@pytest.mark.parametrize("action", [faults.FAILS, faults.SLOW_DOWN, Reset(), faults.FORBIDDEN], ids=str)
def test_stat(proxy: FaultProxy, store: S3Store, bucket: str, action: Action) -> None:
    entry = store.put(join(bucket, "looked at"), DATA)
    rule = proxy.add(action, "looked at", method="HEAD", times=3)
    if action == faults.FORBIDDEN:
        with pytest.raises(Forbidden):
            store.stat(entry.uri)
    else:
        assert store.stat(entry.uri) == entry
        assert rule.done == 3
    proxy.clear()
    proxy.add(faults.ABSENT, "looked at", method="HEAD")
    assert store.stat(entry.uri) is None
    assert store.stat(entry.uri) == entry


def test_a_file_is_read_despite_faults(proxy: FaultProxy, store: S3Store, bucket: str) -> None:
    data = random.Random(8).randbytes(20_000_000)
    entry = store.put(join(bucket, "file"), data)
    for action in (CutShort(100_000), CutShort(50_000, lying=True), Reset(200_000), faults.SLOW_DOWN):
        proxy.add(action, "/file", times=2)
    with StoreFile(store, entry) as file:
        assert hashlib.sha256(file.readall()).digest() == hashlib.sha256(data).digest()
    with io.BufferedReader(StoreFile(store, entry), 1 << 16) as buffered:
        assert b"".join(iter(lambda: buffered.read(77_777), b"")) == data
    assert sum(rule.done for rule in proxy.rules) == 8
    proxy.add(faults.FORBIDDEN, "/file", skip=2, times=None)
    with StoreFile(store, entry) as file, pytest.raises(Forbidden):
        file.readall()


def test_large_bodies(proxy: FaultProxy, store: S3Store, bucket: str) -> None:
    data = random.Random(9).randbytes(100_000_000)
    rule = proxy.add(faults.DONE_BUT_FAILS, "/large", method="PUT")
    entry = store.put(join(bucket, "large"), data)
    assert (entry.size, rule.done) == (len(data), 1)
    proxy.add(Reset(60_000_000), "/large")
    assert store.read(entry.uri) == data
    store.delete(entry.uri)


ODD = [
    *("a//b", "//x", "trailing ", " leading", "a+b", "a%20b", "nfd u\u0308", "nfc \xfc", "bell \x07", "one \x01"),
    *("tab\tnl\n", "<&'\">", "\U0001f600", "dot/./x", "back\\slash", "~!*'()", "end.", "ünï/cödé"),
]


def test_unusual_keys_are_written_and_listed(proxy: FaultProxy, store: S3Store, bucket: str) -> None:
    root = join(bucket, "odd")
    for name in ODD:
        store.put(join(root, name), name.encode())
    found = {entry.uri.removeprefix(f"{root}/"): entry for entry in store.list(root)}
    assert set(found) == set(ODD)
    for name, entry in found.items():
        assert store.stat(entry.uri) == entry
        assert store.read(entry.uri, etag=entry.etag) == name.encode()
        assert store.put_if_absent(entry.uri, name.encode())
        store.delete(entry.uri)
    assert list(store.list(root)) == []


@pytest.mark.parametrize("action", [faults.FAILS, faults.DONE_BUT_FAILS, Reset()], ids=str)
@pytest.mark.parametrize(("method", "skip"), [("PUT", 1), ("POST", 1)], ids=["the second part", "the completion"])
def test_a_large_object_is_uploaded_in_parts(
    s3: Radosgw,
    proxy: FaultProxy,
    store: S3Store,
    bucket: str,
    action: Action,
    method: str,
    skip: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_module, "UPLOAD_BYTES", 1 << 20)
    monkeypatch.setattr(s3_uploads, "PART_BYTES", 5 << 20)
    content = random.Random(0).randbytes((11 << 20) + 3)
    rule = proxy.add(action, "/large", method=method, skip=skip)
    entry = store.put(join(bucket, "large"), io.BytesIO(content))
    assert entry == store.stat(entry.uri)
    assert rule.done == 1
    assert entry.etag.endswith("-3")
    assert store.read(entry.uri, 0, entry.size, entry.etag) == content
    assert "Uploads" not in s3.client().list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))


def test_an_upload_that_fails_leaves_no_parts(
    s3: Radosgw, proxy: FaultProxy, store: S3Store, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "UPLOAD_BYTES", 1 << 20)
    monkeypatch.setattr(s3_uploads, "PART_BYTES", 5 << 20)
    proxy.add(faults.FORBIDDEN, "/uploads/refused", method="PUT", skip=1)
    with pytest.raises(Forbidden):
        store.put(join(bucket, "uploads/refused"), bytes(11 << 20))
    assert store.stat(join(bucket, "uploads/refused")) is None
    assert "Uploads" not in s3.client().list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))


def test_etags_of_multipart_uploads(s3: Radosgw, proxy: FaultProxy, store: S3Store, bucket: str) -> None:
    client, name = s3.client(), bucket.removeprefix("s3://")
    upload = client.create_multipart_upload(Bucket=name, Key="multi")["UploadId"]
    parts = []
    for number, part in enumerate((bytes(5 << 20), b"the end"), 1):
        etag = client.upload_part(Bucket=name, Key="multi", UploadId=upload, PartNumber=number, Body=part)["ETag"]
        parts.append({"PartNumber": number, "ETag": etag})
    client.complete_multipart_upload(Bucket=name, Key="multi", UploadId=upload, MultipartUpload={"Parts": parts})
    entry = store.stat(join(bucket, "multi"))
    assert entry is not None
    assert entry.etag.endswith("-2")
    proxy.add(CutShort(1_000_000), "/multi")
    assert store.read(entry.uri, 0, entry.size, entry.etag) == bytes(5 << 20) + b"the end"
    with pytest.raises(Changed):
        store.read(entry.uri, 0, 10, entry.etag.replace("-2", "-3"))
