"""Exports of an output in a bucket, with images in buckets."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from curation.export.export import export_output
from storage.schemes import open_store
from storage.settings import ConfigError
from storage.store import StoreOptions
from tests.support.exports import KEYS, ROWS, draw, make_key, make_output
from tests.support.stores.radosgw import Radosgw

pytestmark = pytest.mark.s3


def test_images_are_read_from_a_prefix_and_from_their_sources(s3_env: Radosgw, tmp_path: Path) -> None:
    bucket = s3_env.new_bucket()
    store = open_store("s3://bucket", StoreOptions.from_environment())
    sources = [f"s3://{bucket}/originals/{row} é#%20.png" for row in range(ROWS)]
    for row in range(40, ROWS):
        store.put(sources[row], draw(row))
    for row in range(len(KEYS), 42):
        store.put(f"s3://{bucket}/by key/{make_key(row)}", draw(row))
    output = make_output(f"s3://{bucket}/out", sources=sources, thumbnails=False)
    done = export_output(output, "webdataset", tmp_path / "tars", images=f"s3://{bucket}/by key/")
    assert (done.images, done.without_file) == (ROWS - len(KEYS), len(KEYS))
    with tarfile.open(tmp_path / "tars/shard-000000.tar") as tar:
        for row in range(len(KEYS), ROWS):
            file = tar.extractfile(f"plain_{row:05d}.png")
            assert file is not None
            assert file.read() == draw(row)
    with pytest.raises(ConfigError, match="there is no such folder, or it has no files"):
        export_output(output, "webdataset", tmp_path / "more", images=f"s3://{bucket}/nothing")
