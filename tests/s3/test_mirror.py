"""A checkpoint on an S3 server: pinned by its settings only, then fetched, and refused when it was overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from siglip.checkpoint import PinnedModel, pin_model
from siglip.checkpoints.files import TINY, CheckpointError
from siglip.config import ModelConfig
from siglip.encoder import Encoder
from storage.mirror import Mirror
from storage.schemes import open_store
from storage.store import StoreOptions, join
from tests.support.stores.radosgw import Radosgw

pytestmark = pytest.mark.s3


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def options(s3_env: Radosgw) -> StoreOptions:
    return StoreOptions(s3_env.endpoint, "us-east-1")


@pytest.fixture
def source(s3_env: Radosgw, options: StoreOptions) -> str:
    """A prefix with the tiny checkpoint, and with other files that are not wanted."""
    root = f"s3://{s3_env.new_bucket()}/models/tiny"
    store = open_store(root, options)
    for path in TINY.iterdir():
        store.put(join(root, path.name), path.read_bytes())
    store.put(join(root, "pytorch_model.bin"), b"never fetched")
    store.put(join(root, "onnx/config.json"), b"never fetched")
    store.put(root + "-other/config.json", b"another checkpoint")
    return root


def pin(source: str, options: StoreOptions) -> PinnedModel:
    return pin_model(ModelConfig(source=source, dtype="float32", compile=False), Mirror(options))


def test_weights_are_fetched_only_when_they_are_loaded(source: str, options: StoreOptions, cache: Path) -> None:
    pinned = pin(source + "/", options)
    (folder,) = cache.iterdir()
    settings = {"config.json", "preprocessor_config.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == settings
    assert pinned.identity.startswith("etags:")
    assert pinned.identity == pin(source, options).identity
    encoder = Encoder(pinned)
    assert {path.name for path in folder.iterdir()} == settings | {"model.safetensors", "spiece.model"}
    tiny = Encoder(pin_model(ModelConfig(source="tiny", dtype="float32", compile=False)))
    np.testing.assert_array_equal(encoder.embed_texts(["a red circle"]), tiny.embed_texts(["a red circle"]))
    # A file that exists is not written again.
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    pin(source, options).fetch()
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["model.safetensors", "spiece.model", "config.json"])
def test_an_overwritten_file_is_another_checkpoint(source: str, options: StoreOptions, cache: Path, name: str) -> None:
    pinned = pin(source, options)
    assert pinned.fetch().parent == cache
    store = open_store(source, options)
    store.put(join(source, name), store.read(join(source, name)) + b" ")
    with pytest.raises(CheckpointError, match=r"another checkpoint here .* than the one with which the run started"):
        pinned.fetch()
    assert pin(source, options).identity != pinned.identity


def test_several_processes_fetch_at_the_same_time(source: str, options: StoreOptions, cache: Path) -> None:
    """The file has more than 100 MB, as weights do. Every process gets all of its bytes."""
    shard = np.random.default_rng(0).bytes(2**20) * 110 + b"end"
    open_store(source, options).put(join(source, "model-00002-of-00002.safetensors"), shard)
    code = (
        "import hashlib, sys; from storage.mirror import Mirror; from storage.store import StoreOptions;"
        f"folder, _ = Mirror(StoreOptions({options.endpoint!r}, 'us-east-1')).fetch({source!r},"
        " lambda name: name.endswith('.safetensors'), lambda name: True);"
        "print(sorted((p.name, p.stat().st_size) for p in folder.iterdir() if not p.name.startswith('tmp')))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    whole = [
        ("model-00002-of-00002.safetensors", len(shard)),
        ("model.safetensors", (TINY / "model.safetensors").stat().st_size),
    ]
    assert outputs == [str(whole)] * 2
    (folder,) = cache.iterdir()
    assert (folder / "model-00002-of-00002.safetensors").read_bytes() == shard
    assert len(list(folder.iterdir())) == 2  # no incomplete file is left


def test_a_prefix_without_a_checkpoint(s3_env: Radosgw, options: StoreOptions, source: str, cache: Path) -> None:
    bucket = source.split("/")[2]
    for missing in (f"s3://{bucket}/nothing", "s3://no-such-bucket-here/model"):
        with pytest.raises(CheckpointError, match=r"model\.source: ") as refused:
            pin(missing, options)
        assert missing.split("/")[2] in str(refused.value)
        assert "\n" not in str(refused.value)
    open_store(source, options).delete(join(source, "preprocessor_config.json"))
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
        pin(source, options)
    with pytest.raises(CheckpointError, match="needs a mirror"):
        pin_model(ModelConfig(source=source))


def test_a_cache_that_cannot_be_written(source: str, options: StoreOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, reason in (("/proc/cache", "No such file"), ("/dev/null/cache", "Not a directory")):
        monkeypatch.setenv("SIGHTLINE_CACHE", folder)
        with pytest.raises(CheckpointError, match=f"{reason}.*: set SIGHTLINE_CACHE to a folder with room"):
            pin(source, options)


def test_a_full_disk_leaves_no_incomplete_file(
    source: str, options: StoreOptions, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = pin(source, options)
    (folder,) = cache.iterdir()
    real = os.replace

    def fail(one: str, other: str) -> None:
        raise OSError(28, "No space left on device", str(other))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match="No space left on device: set SIGHTLINE_CACHE"):
        pinned.fetch()
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "preprocessor_config.json",
        "tokenizer_config.json",
    }
    monkeypatch.setattr(os, "replace", real)
    assert Encoder(pinned).width == 128
