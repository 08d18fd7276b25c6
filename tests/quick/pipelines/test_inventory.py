"""S3 Inventories: the objects of both formats, versions, and manifests and files that are refused."""

from __future__ import annotations

import gzip
import io
from collections import Counter
from typing import Any

import pytest

from pipelines.inputs.rows import Skipped
from pipelines.planning.inventory import parse_manifest, read_objects, recognizes
from storage.settings import ConfigError
from storage.store import Entry
from tests.support.inventories import CURRENT, VERSIONED, Version, dump, make_file, make_manifest

URI = "s3://lists/inventory/images/daily/2026-01-02T01-00Z/manifest.json"
DATA = "s3://lists/inventory/data/1"
KINDS = ("CSV", "Parquet")
KEYS = [
    "in/a.jpg",
    "in/a b+c.jpg",
    "100%25.jpg",
    "東京/ünï.jpg",
    '"quoted", x.jpg',
    "line\nfeed.jpg",
    "z\U0001f600.jpg",
]


def read(kind: str, versions: list[Version], fields: tuple[str, ...] = CURRENT) -> tuple[list[Entry], Counter[str]]:
    file = make_file(kind, "images", versions, fields)
    inventory = parse_manifest(dump(make_manifest(kind, "images", "lists", {"data/1": file}, fields)), URI)
    skipped = Skipped()
    return list(read_objects(io.BytesIO(file), inventory, DATA, skipped)), skipped.counts


@pytest.mark.parametrize("kind", KINDS)
def test_objects_are_those_of_a_listing(kind: str) -> None:
    versions = [Version(key, number, f"{number:032x}") for number, key in enumerate(KEYS)]
    folders = [Version("in/", 0, "d41d8cd98f00b204e9800998ecf8427e"), Version("in/data/", 5, "e-2")]
    found, counts = read(kind, [*versions, *folders])
    expected = [Entry(f"s3://images/{key}", number, f"{number:032x}") for number, key in enumerate(KEYS)]
    assert found == [*expected, Entry("s3://images/in/data/", 5, "e-2")]
    assert not counts


@pytest.mark.parametrize("kind", KINDS)
def test_older_versions_and_delete_markers_are_left_out_and_counted(kind: str) -> None:
    versions = [
        Version("a.jpg", 7, "new"),
        Version("a.jpg", 6, "old", latest=False),
        Version("b.jpg", None, None, deleted=True),
        Version("b.jpg", 5, "before", latest=False),
        Version("c.jpg", None, None, latest=False, deleted=True),
        Version("c.jpg", 4, "again"),
    ]
    found, counts = read(kind, versions, VERSIONED)
    assert found == [Entry("s3://images/a.jpg", 7, "new"), Entry("s3://images/c.jpg", 4, "again")]
    assert counts == {
        "versions in inventories that are not the latest": 3,
        "delete markers in inventories": 1,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_inventory_has_no_objects(kind: str) -> None:
    assert read(kind, [])[0] == []
    assert parse_manifest(dump(make_manifest(kind, "images", "lists", {})), URI).files == []


@pytest.mark.parametrize("encoded", ["a%20b.jpg", "a+b.jpg"])
def test_blanks_in_csv_keys_have_two_encodings(encoded: str) -> None:
    inventory = parse_manifest(
        dump(make_manifest("CSV", "images", "lists", {}, ("Bucket", "Key", "Size", "ETag"))), URI
    )
    file = io.BytesIO(gzip.compress(f'"images","{encoded}","3","e"\n'.encode()))
    assert list(read_objects(file, inventory, DATA, Skipped())) == [Entry("s3://images/a b.jpg", 3, "e")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("partition", ["aws", "aws-cn", "aws-us-gov"])
def test_files_are_in_the_destination_bucket(kind: str, partition: str) -> None:
    manifest = make_manifest(kind, "images", "lists", {"inventory/data/a b": b"x"})
    manifest["destinationBucket"] = f"arn:{partition}:s3:::lists"
    inventory = parse_manifest(dump(manifest), URI)
    assert inventory.bucket == "images"
    assert [file.uri for file in inventory.files] == ["s3://lists/inventory/data/a b"]
    assert inventory.files[0].md5 == "9dd4e461268c8034f5c8564e155c67a6"


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("CSV", ("Bucket", "Key"), "without Size and ETag: configure the inventory with the optional fields Size and"),
        ("CSV", ("Bucket", "Key", "Size"), "without ETag:"),
        ("Parquet", ("Bucket", "Key", "ETag"), "without size:"),
        ("CSV", ("Bucket", "Key", "VersionId", "Size", "ETag"), "IsLatest and IsDeleteMarker.*current versions only"),
        ("Parquet", ("Bucket", "Key", "VersionId", "Size", "ETag"), "without is_latest and is_delete_marker"),
    ],
)
def test_missing_columns_are_named(kind: str, fields: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_manifest(dump(make_manifest(kind, "images", "lists", {}, fields)), URI)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fileFormat": "ORC"}, "in the format ORC: configure the inventory with CSV or Parquet"),
        ({"sourceBucket": None}, "is no manifest of an S3 Inventory, which has sourceBucket"),
        ({"files": None}, "has no list of files"),
        ({"files": [{"key": "a"}]}, "a file without key or MD5checksum"),
        ({"files": ["a"]}, "a file without key or MD5checksum"),
    ],
)
def test_other_manifests_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_manifest(dump(make_manifest("CSV", "images", "lists", {}) | change), URI)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b'{"version": 1, "shards": []}'])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"manifest\.json is no"):
        parse_manifest(data, URI)


CSV_FILE = make_file("CSV", "images", [Version("a", 1, "e"), Version("b", 2, "f")])


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("CSV", b'"images","a"\n', "cannot be read as CSV in gzip"),
        ("CSV", CSV_FILE[:-12], "cannot be read as CSV in gzip"),
        ("CSV", gzip.compress(b'"images","a"\n', mtime=0), "line 1 has 2 fields, the manifest's fileSchema 7"),
        (
            "CSV",
            gzip.compress(b'"images","a","x","t","e","s","false"\n', mtime=0),
            "no key, size or ETag of s3://images/a",
        ),
        (
            "CSV",
            gzip.compress(b'"images","a","1","t","","s","false"\n', mtime=0),
            "no key, size or ETag of s3://images/a",
        ),
        ("CSV", gzip.compress(b'"images","\xff"\n', mtime=0), "cannot be read as CSV"),
        ("Parquet", CSV_FILE, "cannot be read as Parquet"),
        ("Parquet", make_file("Parquet", "images", [], ("Bucket", "Key")), "has no column size"),
        ("Parquet", make_file("Parquet", "images", [Version("a", None, "e")]), "no key, size or ETag"),
    ],
)
def test_files_that_are_not_as_the_manifest_says_are_refused(kind: str, data: bytes, message: str) -> None:
    inventory = parse_manifest(dump(make_manifest(kind, "images", "lists", {"data/1": data})), URI)
    with pytest.raises(ConfigError, match=message) as caught:
        list(read_objects(io.BytesIO(data), inventory, DATA, Skipped()))
    assert len(str(caught.value).splitlines()) == 1


def test_a_flag_that_is_none_is_refused() -> None:
    inventory = parse_manifest(dump(make_manifest("CSV", "images", "lists", {}, VERSIONED)), URI)
    file = io.BytesIO(gzip.compress(b'"images","a","v","yes","false","1","t","e","s","false"\n', mtime=0))
    with pytest.raises(ConfigError, match="line 1 has 'yes' where"):
        list(read_objects(file, inventory, DATA, Skipped()))


def test_manifests_are_recognized_by_name() -> None:
    assert recognizes(URI)
    assert recognizes("manifest.json")
    assert not recognizes("s3://lists/manifest.json/")
    assert not recognizes("s3://lists/my-manifest.json")
