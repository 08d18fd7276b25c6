"""WebDataset: tars of samples, each an image, its JSON and its embedding. Read with the package `webdataset`."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np

from curation.export.job import Job, Target
from curation.export.names import Repeats, make_tag, make_word
from curation.export.rows import describe, dump

SHARD_BYTES = 1000**3
SHARD_SAMPLES = 10_000
"""A shard ends with the sample with which it reaches one of these sizes."""


def write(job: Job, path: str) -> None:
    """Write tars `shard-000000.tar`, ... to a folder.

    A sample is `NAME.jpg` (or the extension of the image's format), `NAME.json` with the row's columns and `NAME.npy`
    with the embedding, float32 (D,). The name is a word made from the key: WebDataset takes all from the first dot of a
    file's name for the extension. Names of different rows are different, in the whole export. The tars have no times
    and no owners: the same rows give the same bytes.

    Memory holds one batch of `curation.export.images`, and 8 bytes for each row.
    """
    repeated = Repeats(
        make_word(key).lower() for batch in job.selection.batches(["key"]) for key in batch["key"].to_pylist()
    )
    number = samples = 0
    tar: tarfile.TarFile | None = None
    try:
        for batch, vectors, pictures in job.pictures():
            for row, vector, picture in zip(describe(batch), vectors, pictures, strict=True):
                if tar is not None and (samples >= SHARD_SAMPLES or tar.offset >= SHARD_BYTES):
                    tar.close()
                    tar = None
                if tar is None:
                    tar = tarfile.open(  # noqa: SIM115  # a tar is open for many samples
                        Path(path) / f"shard-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT
                    )
                    number, samples = number + 1, 0
                name = make_word(row["key"])
                if name.lower() in repeated:  # a disk may not tell cases apart
                    name += f"-{make_tag(row['id'])}"
                buffer = io.BytesIO()
                np.save(buffer, vector, allow_pickle=False)
                _add(tar, f"{name}.{picture.extension}", picture.data)
                _add(tar, f"{name}.json", dump(row))
                _add(tar, f"{name}.npy", buffer.getvalue())
                samples += 1
    finally:
        if tar is not None:
            tar.close()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


TARGET = Target("needed", write)
