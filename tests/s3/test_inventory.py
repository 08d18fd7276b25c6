"""S3 Inventories on a real S3 server: they yield what a listing of the bucket yields, or an error."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines.config import JobConfig
from pipelines.inputs.rows import Skipped
from pipelines.output.output import Output
from pipelines.planning.inventory import list_inventory
from pipelines.planning.plan import list_shards, read_shard_inputs
from storage.schemes import open_store
from storage.settings import ConfigError
from storage.store import Changed, Entry, NotFound, Store, StoreOptions
from tests.support.input_folder import extend_plan
from tests.support.inventories import Version, dump, make_file, make_manifest
from tests.support.stores.radosgw import Radosgw

pytestmark = pytest.mark.s3

KEYS = ["in/a.jpg", "in/a b+c.jpg", "100%25 %.jpg", "東京/ünï.jpg", "in/", "x//y.jpg", "z\U0001f600.jpg"]


@pytest.fixture
def options(s3_env: Radosgw) -> StoreOptions:
    return StoreOptions(s3_env.endpoint, "us-east-1")


@pytest.fixture
def images(s3_env: Radosgw) -> str:
    """A bucket with objects, and one that a console created to show a folder."""
    name, client = s3_env.new_bucket(), s3_env.client()
    for key in KEYS:
        client.put_object(Bucket=name, Key=key, Body=b"" if key.endswith("/") else key.encode())
    return name


def write_inventory(s3: Radosgw, store: Store, images: str, kind: str, rows: int = 3) -> Entry:
    """Write an inventory of a bucket, `rows` in each file, and return its manifest."""
    lists = s3.new_bucket()
    objects = s3.client().list_objects_v2(Bucket=images)["Contents"]
    versions = [Version(one["Key"], one["Size"], one["ETag"].strip('"')) for one in objects]
    files = {
        f"inventory/data/{start}.{kind.lower()}": make_file(kind, images, versions[start : start + rows])
        for start in range(0, len(versions), rows)
    }
    for key, data in files.items():
        store.put(f"s3://{lists}/{key}", data)
    manifest = dump(make_manifest(kind, images, lists, files))
    return store.put(f"s3://{lists}/inventory/{images}/daily/2026-01-02T01-00Z/manifest.json", manifest)


@pytest.mark.parametrize("kind", ["CSV", "Parquet"])
def test_an_inventory_is_the_listing_of_its_bucket(
    s3_env: Radosgw, options: StoreOptions, images: str, kind: str
) -> None:
    store = open_store(f"s3://{images}", options)
    entry = write_inventory(s3_env, store, images, kind)
    listed = list(store.list(f"s3://{images}"))
    assert list(list_inventory(entry, options, Skipped())) == listed
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: list(list_inventory(entry, options, Skipped())), range(4)))
    assert found == [listed] * 4


def test_a_file_with_another_md5_is_refused_before_its_first_row(
    s3_env: Radosgw, options: StoreOptions, images: str
) -> None:
    store = open_store(f"s3://{images}", options)
    entry = write_inventory(s3_env, store, images, "CSV")
    first, second, *_ = sorted(one.uri for one in store.list(entry.uri.partition("/inventory/")[0] + "/inventory/data"))
    store.put(second, store.read(first))
    found: list[Entry] = []
    with pytest.raises(Changed, match=r"3\.csv is not the file that its manifest names: its MD5 is"):
        found.extend(list_inventory(entry, options, Skipped()))
    store.delete(second)
    with pytest.raises(NotFound, match="take a newer inventory"):
        list(list_inventory(entry, options, Skipped()))


def test_a_large_object_is_no_manifest(options: StoreOptions, images: str) -> None:
    entry = Entry(f"s3://{images}/manifest.json", 1 << 30, "e")
    with pytest.raises(ConfigError, match="1,073,741,824 bytes, so it is no manifest"):
        list(list_inventory(entry, options, Skipped()))


def test_a_job_takes_its_inputs_from_an_inventory(s3_env: Radosgw, options: StoreOptions, images: str) -> None:
    """With the same keys as from the bucket, each object once, and an object of the bucket is known afterwards."""
    store = open_store(f"s3://{images}", options)
    manifests = [write_inventory(s3_env, store, images, kind).uri for kind in ("CSV", "Parquet")]
    lists = s3_env.new_bucket()

    def plan(output: str, *inputs: str) -> tuple[int, int, set[str]]:
        config = JobConfig(input=inputs, output=f"s3://{lists}/{output}", labels=["a"])
        report, _ = extend_plan(config, options)
        made = Output(config.output, options)
        keys = {one.key for ref in list_shards(made) for one in read_shard_inputs(made, ref)}
        return report.inputs, report.known, keys

    pictures = {key for key in KEYS if key.endswith(".jpg")}
    assert plan("bucket", f"s3://{images}") == (len(pictures), 0, pictures)
    assert plan("one", manifests[0]) == (len(pictures), 0, pictures)
    assert plan("both", *manifests, f"s3://{images}/in")[0] == len(pictures)
    assert plan("one", f"s3://{images}") == (0, len(pictures), pictures)
