"""The reader stage without Ray: an input that reveals a fault of the code makes only its own shard wait."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.cluster import RETRIES
from pipelines.config import JobConfig
from pipelines.inputs import tar
from pipelines.inputs.columns import PassedColumns
from pipelines.inputs.rows import Input, Reading, Row, Skipped
from pipelines.output.output import Output
from pipelines.output.schema import OutputFormat
from pipelines.planning.plan import ShardRef, append_inputs, list_shards, read_plan
from pipelines.stages import reader
from pipelines.stages.reader import ReaderConfig, read_shard
from siglip.config import ImageSpec, Limits
from siglip.images.decode import decode_image
from siglip.images.decoder import DecoderRing
from storage.store import StoreOptions
from tests.support.jobs import make_image
from tests.support.tars import make_tar


@pytest.fixture(scope="module", autouse=True)
def closed_decoders() -> Iterator[None]:
    """A worker keeps its decoders until its process ends. Those of these tests are closed after the last one."""
    rings: list[DecoderRing] = []

    @cache
    def make_ring(*settings: Any) -> DecoderRing:
        rings.append(DecoderRing(*settings))
        return rings[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "_decoder_ring", make_ring)
        yield
    for ring in rings:
        ring.close()


def plan(root: Path) -> tuple[list[ShardRef], ReaderConfig]:
    """Plan two tars of two images each, a shard each."""
    for name in ("a", "b"):
        (root / "input").mkdir(exist_ok=True)
        (root / "input" / f"{name}.tar").write_bytes(make_tar((f"{name}{n}.jpg", make_image(n)) for n in range(2)))
    config = JobConfig(input=str(root / "input"), output=str(root / "output"), labels=["x"], rows_per_shard=2)
    output = Output(config.output)
    assert append_inputs(config, output, read_plan(output), PassedColumns({}), lambda: None)
    reading = Reading(StoreOptions(), config.limits.max_bytes, config.parquet)
    format_ = OutputFormat(4, "float32", False, pa.schema([]))
    return list(list_shards(output)), ReaderConfig(output, format_, reading, ImageSpec(size=32), Limits(), "auto", None)


def read(ref: ShardRef, config: ReaderConfig) -> tuple[list[str], dict[str, Any]]:
    """Read a shard. Returns the keys of its rows, and its summary."""
    table = pa.concat_tables(read_shard(pa.table({"refs": [[vars(ref)]]}), config))
    keys = [key for key in table["key"].to_pylist() if key is not None]
    return keys, json.loads(table["summary"].to_pylist()[-1])


@pytest.mark.parametrize("error", [KeyError("bytes"), MemoryError(), RecursionError("too deep")])
def test_an_unexpected_exception_makes_only_its_own_shard_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    refs, config = plan(tmp_path)
    original = tar.read

    def read_or_fail(planned: Input, reading: Reading, skipped: Skipped) -> Iterator[Row]:
        yield from original(planned, reading, skipped)
        if planned.key == "a.tar":
            raise error

    monkeypatch.setattr(tar, "read", read_or_fail)
    _, summary = read(refs[0], config)
    assert summary["wait"] == "error"
    assert f"a.tar: {type(error).__name__}" in summary["detail"]
    keys, summary = read(refs[1], config)
    assert (keys, summary["wait"]) == (["b0", "b1"], None)


def test_a_value_that_arrow_cannot_hold_makes_only_its_own_shard_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs, config = plan(tmp_path)
    monkeypatch.setattr(tar, "read", lambda planned, reading, skipped: iter([Row("\ud800", planned.uri)]))
    keys, summary = read(refs[0], config)
    assert (keys, summary["wait"]) == ([], "error")


def test_a_shard_whose_reader_died_at_every_attempt_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refs, config = plan(tmp_path)
    monkeypatch.setattr(reader, "count_retries", lambda: RETRIES)
    keys, summary = read(refs[0], config)
    assert (keys, summary["wait"]) == ([], "error")
    assert "died at 5 attempts" in summary["detail"]
    assert "a.tar" in summary["detail"]


def test_the_shards_of_a_block_that_has_ended_two_processes_are_left_to_blocks_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs, config = plan(tmp_path)
    block = pa.table({"refs": [[vars(ref) for ref in refs]]})
    for retries in (0, 1):
        monkeypatch.setattr(reader, "count_retries", lambda retries=retries: retries)
        table = pa.concat_tables(read_shard(block, config))
        assert [(key or "end") for key in table["key"].to_pylist()] == ["a0", "a1", "end", "b0", "b1", "end"]
    monkeypatch.setattr(reader, "count_retries", lambda: 2)
    assert pa.concat_tables(read_shard(block, config)).num_rows == 0
    assert read(refs[0], config)[0] == ["a0", "a1"]


def test_consecutive_rows_with_the_same_bytes_get_the_pixels_of_one_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs, config = plan(tmp_path)
    one, other, broken = make_image(1), make_image(2), make_image(3)[:200]
    images = [one, one, other, one, broken, broken, other, other]
    rows = [Row(str(number), "x", data) for number, data in enumerate(images)]
    monkeypatch.setattr(tar, "read", lambda planned, reading, skipped: iter(rows))
    submitted: list[bytes] = []
    submit = DecoderRing.submit

    def record(ring: DecoderRing, data: bytes) -> None:
        submitted.append(data)
        submit(ring, data)

    monkeypatch.setattr(DecoderRing, "submit", record)
    monkeypatch.setattr(reader, "BLOCK_PIXEL_BYTES", 3 * 3 * 32 * 32)  # three rows in a block
    table = pa.concat_tables(read_shard(pa.table({"refs": [[vars(refs[0])]]}), config))
    assert submitted == [one, other, one, broken, other]
    pixels = table["pixels"].to_pylist()[:-1]
    spec = config.spec
    expected = [decode_image(data, spec, config.limits, "auto").pixels.tobytes() for data in (one, other)]
    assert pixels == [expected[0], expected[0], expected[1], expected[0], None, None, expected[1], expected[1]]
    assert table["reason"].to_pylist()[4:6] == ["truncated", "truncated"]


def test_a_block_is_bounded_in_bytes_of_metadata_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refs, config = plan(tmp_path)
    rows = [Row(str(number), "x", make_image(number), metadata="x" * 2**20) for number in range(20)]
    monkeypatch.setattr(tar, "read", lambda planned, reading, skipped: iter(rows))
    blocks = list(read_shard(pa.table({"refs": [[vars(refs[0])]]}), config))
    assert [block.num_rows for block in blocks] == [8, 8, 5]
