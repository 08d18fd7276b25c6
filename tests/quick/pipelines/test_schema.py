"""The schemas of an output derive from one list of columns, and how its files are encoded."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.outputs import SyntheticOutput, write_output
from curation.model import find_texts
from curation.retag import RetagConfig, retag_shard
from curation.tagged_output import open_output, read_embeddings
from pipelines.output.ledger import Ledger, ledger_path
from pipelines.output.output import Output, commit_path
from pipelines.output.row_files import dump_files
from pipelines.output.schema import COLUMN_PREFIX, MODEL_COLUMNS, OutputFormat, parquet_options
from pipelines.output.state import read_state
from pipelines.output.writer import OutputWriter
from pipelines.planning.plan import list_shards, read_plan
from pipelines.upkeep.verify import verify_output
from siglip.heads import build_head
from siglip.labels import LabelSet

PASSED = pa.schema([("stage", pa.struct([("x", pa.int32()), ("names", pa.list_(pa.string()))])), ("a.b", pa.int8())])


def make_format(**changes: Any) -> OutputFormat:
    return OutputFormat(**{"width": 4, "embedding_dtype": "float32", "thumbnails": True, "columns": PASSED, **changes})


def test_a_part_has_the_columns_of_both_files_and_readers_fill_all_but_the_models() -> None:
    format_ = make_format(bands=True)
    part = set(format_.part_schema().names)
    own = set(format_.data_schema().names) - set(PASSED.names)
    assert part == own | set(format_.rejects_schema().names) | {COLUMN_PREFIX + name for name in PASSED.names}
    assert part - set(format_.block_schema().names) == MODEL_COLUMNS


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_only_embeddings_are_uncompressed(dtype: Any) -> None:
    schema = make_format(embedding_dtype=dtype).data_schema()
    buffer = io.BytesIO()
    rows = [
        {
            "key": "a",
            "source": "b",
            "row": 0,
            "width": 1,
            "height": 1,
            "sha256": "c",
            "embedding": np.zeros(4, np.float16 if dtype == "float16" else np.float32),
            "stage": {"x": 1, "names": ["d"]},
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer, **parquet_options(schema))
    group = pq.ParquetFile(buffer).metadata.row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    assert [column.path_in_schema for column in columns if column.compression == "UNCOMPRESSED"] == [
        "embedding.list.element"
    ]
    assert {column.compression for column in columns} == {"UNCOMPRESSED", "ZSTD"}


@pytest.fixture
def old_output(tmp_path: Path) -> Output:
    """An output as it was written before embeddings were stored uncompressed: all columns with zstd."""
    vectors = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = LabelSet.model_validate({"names": ["cat", "dog"], "threshold": 0})
    write_output(
        str(tmp_path / "old"),
        SyntheticOutput(labels, vectors[:2], 1, lambda shard: vectors, reject=lambda shard: ["corrupt"]),
    )
    output = Output(str(tmp_path / "old"))
    manifest = output.read_json("manifest.json")
    record = output.read_commit("000000-000000")
    for file in record["files"]:
        path = tmp_path / "old" / file["path"]
        pq.write_table(pq.read_table(path), path, compression="zstd", use_dictionary=["source"])
        data = path.read_bytes()
        file |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    put_json(output, commit_path("000000-000000"), record)
    output.delete(ledger_path(0))
    read_state(output, read_plan(output)).finish(manifest["fingerprint"], {}, [])
    return output


def put_json(output: Output, path: str, value: dict[str, Any]) -> None:
    output.store.put(output.uri_of(path), json.dumps(value).encode())


def test_an_output_with_compressed_embeddings_is_read_and_verified(old_output: Output) -> None:
    [(_, file)] = Ledger.read(old_output).list_files(["data"])
    metadata = pq.read_metadata(io.BytesIO(old_output.read(file.path)))
    assert metadata.row_group(0).column(metadata.num_columns - 2).compression == "ZSTD"
    report = verify_output(old_output)
    assert report.ok, report.problems
    [batch] = open_output(old_output.uri).batches(["embedding"])
    assert read_embeddings(batch).shape == (40, 8)


def test_an_output_with_compressed_embeddings_is_retagged(old_output: Output, tmp_path: Path) -> None:
    source = open_output(old_output.uri)
    labels = LabelSet.model_validate({"names": ["dog"], "threshold": 0})
    texts = find_texts(source, labels)
    assert texts is not None
    table = replace(source.table, labels=labels, head=build_head(labels, texts, source.table.scale, source.weights))
    new = Output(str(tmp_path / "new"))
    [ref] = list_shards(old_output)
    ref = replace(ref, files=dump_files(source.ledger.find_files([ref.shard])[ref.shard]))
    done = retag_shard(ref, RetagConfig(old_output, OutputWriter(new, source.format, "{}"), table))
    assert done[:2] == (40, 40)
    record = new.read_commit(ref.shard)
    assert (record["rows_tagged"], record["rows_rejected"], record["reasons"]) == (40, 1, {"corrupt": 1})
    assert record["labels"] == {"dog": 40}
    rows = pq.read_table(io.BytesIO(new.read(record["files"][0]["path"])))
    assert rows["labels"].to_pylist() == [["dog"]] * 40
    [(_, file)] = source.ledger.list_files(["data"])
    before = pq.read_table(io.BytesIO(old_output.read(file.path)))
    kept = [name for name in before.column_names if name not in ("labels", "scores")]
    assert rows.select(kept).equals(before.select(kept))
    rejects = [pq.read_table(io.BytesIO(output.read(path))) for output, path in rejects_of(old_output, new)]
    assert rejects[0].num_rows == 1
    assert rejects[0].equals(rejects[1])


def rejects_of(*outputs: Output) -> list[tuple[Output, str]]:
    return [(output, path) for output in outputs for path in output.files() if path.startswith("rejects/")]
