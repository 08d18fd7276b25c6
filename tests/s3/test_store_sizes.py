"""Files of realistic sizes: a Parquet file of over 100 MB with a row group of 44 MiB, and a tar of the same size."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.files import READ_BYTES, StoreFile
from storage.schemes import open_store
from storage.store import Changed, Entry, NotFound, Store, StoreOptions, join
from tests.support.stores.radosgw import Radosgw

ROWS, GROUP = 240, 96
IMAGE_BYTES = 480_000


class Counting:
    """A store that counts the bytes read from it."""

    def __init__(self, store: Store) -> None:
        self.store, self.bytes, self.calls = store, 0, 0

    def read(self, uri: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytes:
        data = self.store.read(uri, start, stop, etag)
        self.bytes += len(data)
        self.calls += 1
        return data


@pytest.fixture(scope="module", params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, str]]:
    if request.param == "local":
        root = str(tmp_path_factory.mktemp("sizes"))
        yield open_store(root), root
        return
    server: Radosgw = request.getfixturevalue("s3")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        root = f"s3://{server.new_bucket()}"
        yield open_store(root, StoreOptions(server.endpoint, "us-east-1")), root


@pytest.fixture(scope="module")
def parquet(place: tuple[Store, str]) -> tuple[Entry, list[str]]:
    """The file's entry, and the digest of each image."""
    rng = random.Random(1)
    images = [rng.randbytes(IMAGE_BYTES) for _ in range(ROWS)]
    buffer = io.BytesIO()
    table = pa.table({"image": images, "id": list(range(ROWS)), "text": [f"text {n}" for n in range(ROWS)]})
    pq.write_table(table, buffer, row_group_size=GROUP, compression="none", use_dictionary=False)
    data = buffer.getvalue()
    assert len(data) > 100 << 20
    store, root = place
    digests = [hashlib.sha256(image).hexdigest() for image in images]
    return store.put(join(root, "large.parquet"), data), digests


@pytest.mark.parametrize(
    "options", [{}, {"buffer_size": 1 << 16}, {"buffer_size": 4 << 20}, {"pre_buffer": True}], ids=str
)
def test_a_row_group_larger_than_a_read(
    place: tuple[Store, str], parquet: tuple[Entry, list[str]], options: dict[str, int]
) -> None:
    entry, digests = parquet
    counting = Counting(place[0])
    with StoreFile(counting, entry) as raw, pq.ParquetFile(raw, **options) as file:  # type: ignore[arg-type]
        assert file.metadata.row_group(0).total_byte_size > 42 << 20
        found = [
            hashlib.sha256(image).hexdigest()
            for batch in file.iter_batches(64, columns=["image"])
            for image in batch["image"].to_pylist()
        ]
    assert found == digests
    assert counting.bytes < 1.15 * entry.size


def test_random_access_reads_few_extra_bytes(place: tuple[Store, str], parquet: tuple[Entry, list[str]]) -> None:
    counting = Counting(place[0])
    with StoreFile(counting, parquet[0]) as raw, pq.ParquetFile(raw) as file:  # type: ignore[arg-type]
        table = file.read_row_group(1, columns=["id", "text"])
    assert table["id"].to_pylist() == list(range(GROUP, 2 * GROUP))
    assert counting.bytes < 1 << 20
    assert counting.calls < 6


def test_a_large_tar_is_streamed(place: tuple[Store, str]) -> None:
    store, root = place
    rng = random.Random(2)
    sizes = [*([250_000] * 280), 30_000_000, 1, 0, *([250_000] * 20)]
    contents, buffer = [], io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, size in enumerate(sizes):
            contents.append(rng.randbytes(size))
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = size
            tar.addfile(member, io.BytesIO(contents[-1]))
    entry = store.put(join(root, "large.tar"), buffer.getvalue())
    assert entry.size > 100 << 20
    counting = Counting(store)
    raw = io.BufferedReader(StoreFile(counting, entry), 1 << 20)  # type: ignore[arg-type]
    with raw, tarfile.open(fileobj=raw, mode="r:") as tar:
        found = [file.read() for member in tar if (file := tar.extractfile(member)) is not None]
    assert found == contents
    assert counting.bytes == entry.size
    assert counting.calls < 60


READS: list[Callable[[StoreFile, int], bytes]] = [
    lambda file, n: file.read(n),
    lambda file, n: file.read(n + (1 << 60)),
    lambda file, n: file.readall(),
    lambda file, n: bytes(memoryview(target := bytearray(n))[: file.readinto(target)]),
    lambda file, n: io.BufferedReader(file, 1 << 16).read(n),
    lambda file, n: io.BufferedReader(file, 1 << 16).read(),
]


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("start", [0, 1, 5 * READ_BYTES + 17])
def test_all_methods_of_reading(
    place: tuple[Store, str], parquet: tuple[Entry, list[str]], read: Callable[[StoreFile, int], bytes], start: int
) -> None:
    store, entry = place[0], parquet[0]
    with StoreFile(store, entry) as file:
        file.seek(start)
        data = read(file, entry.size - start)
        assert len(data) == entry.size - start
        assert data == store.read(entry.uri, start)
        if not file.closed:
            assert file.read(1) == b""


def test_any_sequence_of_reads_returns_the_file_s_bytes(place: tuple[Store, str]) -> None:
    store, root = place
    data = random.Random(3).randbytes(300_000)
    entry = store.put(join(root, "walk"), data)
    rng = random.Random(4)
    for chunk in (1, 1000, 70_000) if root.startswith("/") else (7000, 70_000):
        with StoreFile(store, entry, chunk) as file:
            for _ in range(60):
                if rng.random() < 0.3:
                    file.seek(rng.randrange(len(data) + 100))
                begin, size = file.tell(), rng.choice([0, 1, 100, 5000, rng.randrange(50_000)]) if chunk > 1 else 3
                assert file.read(size) == data[begin : begin + size]
                assert file.tell() == min(begin + size, max(begin, len(data)))


def test_a_file_that_differs_from_its_entry(place: tuple[Store, str]) -> None:
    store, root = place
    entry = store.put(join(root, "shrunk"), bytes(100_000))
    with StoreFile(store, Entry(entry.uri, 100_001, entry.etag)) as file, pytest.raises(Changed, match="100001"):
        file.readall()
    store.put(entry.uri, bytes(50_000))
    with StoreFile(store, entry) as file, pytest.raises(Changed):
        file.readall()
    with StoreFile(store, Entry(entry.uri, 100_000, "")) as file, pytest.raises(Changed):
        file.readall()
    with pytest.raises(NotFound):
        StoreFile(store, Entry(entry.uri, -1, ""))
