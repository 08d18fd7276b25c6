"""S3 Inventories for tests: manifests and files in the formats that Amazon documents."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.parquet as pq

FIELDS = {
    "Bucket": ("bucket", pa.string()),
    "Key": ("key", pa.string()),
    "VersionId": ("version_id", pa.string()),
    "IsLatest": ("is_latest", pa.bool_()),
    "IsDeleteMarker": ("is_delete_marker", pa.bool_()),
    "Size": ("size", pa.int64()),
    "LastModifiedDate": ("last_modified_date", pa.timestamp("ms", tz="UTC")),
    "ETag": ("e_tag", pa.string()),
    "StorageClass": ("storage_class", pa.string()),
    "IsMultipartUploaded": ("is_multipart_uploaded", pa.bool_()),
    "EncryptionStatus": ("encryption_status", pa.string()),
}
"""The fields of an inventory in their order in CSV files: the name and type that each has in Parquet files."""
CURRENT = ("Bucket", "Key", "Size", "LastModifiedDate", "ETag", "StorageClass", "IsMultipartUploaded")
"""The fields of an inventory of current versions. One of all versions has three more."""
VERSIONED = (*CURRENT[:2], "VersionId", "IsLatest", "IsDeleteMarker", *CURRENT[2:])

_PARQUET_TYPES = {
    pa.string(): ("binary", " (UTF8)"),
    pa.bool_(): ("boolean", ""),
    pa.int64(): ("int64", ""),
    pa.timestamp("ms", tz="UTC"): ("int64", " (TIMESTAMP_MILLIS)"),
}


@dataclass(frozen=True)
class Version:
    """A version of an object in an inventory. A delete marker has no size and no ETag."""

    key: str
    size: int | None
    etag: str | None
    latest: bool = True
    deleted: bool = False


def make_file(kind: str, bucket: str, versions: Sequence[Version], fields: Sequence[str] = CURRENT) -> bytes:
    """The bytes of a file of an inventory. `kind` is CSV or Parquet."""
    rows = [_make_row(bucket, version) for version in versions]
    if kind == "Parquet":
        schema = pa.schema([FIELDS[name] for name in fields])
        values = [pa.array([row[name] for row in rows], FIELDS[name][1]) for name in fields]
        file = io.BytesIO()
        pq.write_table(pa.table(values, schema=schema), file, compression="snappy")
        return file.getvalue()
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    for row in rows:
        row["Key"] = quote_plus(row["Key"], safe="/")
        row["LastModifiedDate"] = "2026-01-02T03:04:05.000Z"
        cells = [row[name] for name in fields]
        writer.writerow(
            ["" if cell is None else str(cell).lower() if cell in (True, False) else cell for cell in cells]
        )
    return gzip.compress(text.getvalue().encode(), mtime=0)


def _make_row(bucket: str, version: Version) -> dict[str, Any]:
    return {
        "Bucket": bucket,
        "Key": version.key,
        "VersionId": f"version-{version.latest}",
        "IsLatest": version.latest,
        "IsDeleteMarker": version.deleted,
        "Size": version.size,
        "LastModifiedDate": 1_767_323_045_000,
        "ETag": version.etag,
        "StorageClass": None if version.deleted else "STANDARD",
        "IsMultipartUploaded": "-" in (version.etag or ""),
        "EncryptionStatus": None if version.deleted else "SSE-S3",
    }


def make_manifest(
    kind: str, bucket: str, destination: str, files: dict[str, bytes], fields: Sequence[str] = CURRENT
) -> dict[str, Any]:
    """The manifest of an inventory with these files, by key."""
    columns = [(FIELDS[name][0], *_PARQUET_TYPES[FIELDS[name][1]]) for name in fields]
    parts = [
        f"{'required' if number < 2 else 'optional'} {physical} {name}{logical};"
        for number, (name, physical, logical) in enumerate(columns)
    ]
    return {
        "sourceBucket": bucket,
        "destinationBucket": f"arn:aws:s3:::{destination}",
        "version": "2016-11-30",
        "creationTimestamp": "1767323045000",
        "fileFormat": kind,
        "fileSchema": ", ".join(fields) if kind == "CSV" else f"message s3.inventory {{ {' '.join(parts)} }}",
        "files": [
            {"key": key, "size": len(data), "MD5checksum": hashlib.md5(data).hexdigest()} for key, data in files.items()
        ],
    }


def dump(manifest: dict[str, Any]) -> bytes:
    """A manifest as S3 writes it."""
    return json.dumps(manifest, indent=2).encode()
