"""A folder of images with `metadata.parquet`: `datasets.load_dataset("imagefolder", data_dir=FOLDER)` loads it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from curation.export.destination import write_new
from curation.export.job import Job, Target, add_vectors, list_columns
from curation.export.names import make_tag, make_word
from curation.tagged_output import TaggedOutput
from storage.settings import ConfigError

FOLDER_FILES = 10_000
"""Files in a folder: the Hugging Face Hub takes no more, and file systems get slow with many."""
_GROUP_ROWS = 4096


def write(job: Job, path: str) -> None:
    """Write the folder: `train/00000/NAME.jpg`, 10,000 files to a folder, and `train/metadata.parquet`.

    All images are below `train/`, and no folder has a name of the input: `datasets` takes folders and files whose names
    contain words such as test or val for other splits, and would load only those. The names are words made from the
    keys, which stand in `metadata.parquet` as they are. Memory holds the metadata of 4,096 rows, and one batch of
    `curation.export.images`.
    """
    plain = job.make_schema()
    schema = pa.schema([pa.field("file_name", pa.string(), nullable=False), *plain])
    root = Path(path) / "train"
    root.mkdir()
    held: list[pa.RecordBatch] = []
    written = 0
    with pq.ParquetWriter(root / "metadata.parquet", schema, compression="zstd", use_dictionary=["source"]) as writer:
        for batch, vectors, pictures in job.pictures():
            names = []
            for key, row, picture in zip(batch["key"].to_pylist(), batch["id"].to_pylist(), pictures, strict=True):
                folder, word = f"{written // FOLDER_FILES:05d}", make_word(key)
                wanted = (f"{folder}/{word}", f"{folder}/{word}-{make_tag(row)}")
                names.append(write_new(root, [f"{name}.{picture.extension}" for name in wanted], picture.data))
                written += 1
            columns = [pa.array(names, pa.string()), *add_vectors(batch, vectors, plain).columns]
            held.append(pa.RecordBatch.from_arrays(columns, schema=schema))
            if sum(map(len, held)) >= _GROUP_ROWS:
                writer.write_table(pa.Table.from_batches(held))
                held = []
        if held:
            writer.write_table(pa.Table.from_batches(held))


def _prepare(output: TaggedOutput, destination: str, with_images: bool) -> list[str]:
    for name in list_columns(output):
        if name in ("file_name", "image") or name.endswith("_file_name"):
            raise ConfigError(f"the output has a column {name}, a name that has a meaning here: use --to hf")
    return []


TARGET = Target("needed", write, prepare=_prepare)
