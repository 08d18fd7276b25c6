"""Peak memory of each command over one shard, and over a shard that is four times as large.

    python -m benchmarks.shard_memory

A tar is one shard, however many images it has. Each step is a process of its own, whose imports are in its memory; the
first step only opens the output. Thumbnails are random bytes, so that files are as large as the rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.outputs import SyntheticOutput, write_output
from curation.retag import RetagConfig, retag_shard
from curation.sampling.files import write_sample
from curation.sampling.sample import Goal, draw_sample
from curation.tagged_output import open_output
from pipelines.output.commit import commit_shard
from pipelines.output.ledger import Ledger
from pipelines.output.output import Output
from pipelines.output.row_files import dump_files, read_rows
from pipelines.output.writer import OutputWriter
from pipelines.planning.plan import ShardRef, list_shards
from pipelines.stages.parts import ShardSummary
from pipelines.upkeep.retry import find_retry
from pipelines.upkeep.verify import verify_output
from siglip.labels import LabelSet

WIDTH = 768
PART_ROWS = 256


def make(root: str, rows: int, thumbnail_bytes: int) -> None:
    """Write an output of one shard, and the shard's parts in another output that has the same plan."""
    rng = np.random.default_rng(0)

    def embed(shard: int) -> np.ndarray:
        vectors = np.random.default_rng(shard).standard_normal((rows, WIDTH), np.float32)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)

    made = SyntheticOutput(
        labels=LabelSet(names=["cat", "dog"]),
        texts=embed(1)[:2],
        shards=1,
        embed=embed,
        reject=lambda shard: ["corrupt"] * (rows // 100),
        thumbnail=lambda row: b"\xff\xd8" + rng.bytes(thumbnail_bytes - 2),
    )
    write_output(root, made)
    output = Output(root)
    target = Output(f"{root}-parts")
    for segment in output.segments():
        path = output.path_of(segment.uri)
        target.put_if_absent(path, output.read(path))
    writer = _writer(root, target)
    [ref] = list_shards(output)
    schema = writer.format.part_schema()
    runs: dict[str, list[int]] = {}
    for file in Ledger.read(output).find_files([ref.shard])[ref.shard]:
        for batch in read_rows(output, file):
            for start in range(0, len(batch), PART_ROWS):
                found = batch.slice(start, PART_ROWS)
                numbers = found["row"]
                columns = {
                    field.name: found[field.name]
                    if field.name in found.schema.names
                    else pa.nulls(len(found), field.type)
                    for field in schema
                }
                part = writer.write_part(ref.name, pa.table(columns))
                runs[part] = [numbers[0].as_py(), numbers[-1].as_py() + 1]
    (Path(f"{root}-parts") / "runs.json").write_text(json.dumps(runs))


def _writer(root: str, target: Output) -> OutputWriter:
    return OutputWriter(target, open_output(root).format, Output(root).read("fingerprint.json").decode())


def _only_shard(root: str) -> ShardRef:
    output = Output(root)
    [ref] = list_shards(output)
    return replace(ref, files=dump_files(Ledger.read(output).find_files([ref.shard])[ref.shard]))


def _commit(root: str) -> None:
    target = Output(f"{root}-parts")
    runs = json.loads((Path(target.uri) / "runs.json").read_text())
    rows = max(run[1] for run in runs.values())
    commit_shard(_writer(root, target), _only_shard(root), runs, ShardSummary([0, rows], rows))


def _verify(root: str) -> None:
    report = verify_output(Output(root))
    assert report.ok, report.problems


def _find_retry(root: str) -> None:
    find_retry(Output(root), replace(_only_shard(root), generation=1), ["corrupt"])


def _retag(root: str) -> None:
    output = open_output(root)
    retag_shard(_only_shard(root), RetagConfig(Output(root), _writer(root, Output(f"{root}-new")), output.table))


def _sample(root: str) -> None:
    output = open_output(root)
    write_sample(output, draw_sample(output, output.rows // 4), Path(f"{root}-sample"), 0, Goal())


STEPS: dict[str, Callable[[str], object]] = {
    "open": open_output,
    "commit": _commit,
    "verify": _verify,
    "retry": _find_retry,
    "retag": _retag,
    "sample": _sample,
}


def measure(step: str, root: str) -> float:
    """Return the peak resident memory in MiB of a process that runs one step."""
    code = f"from benchmarks.shard_memory import STEPS; STEPS[{step!r}]({root!r}); from resource import *; "
    code += "print(getrusage(RUSAGE_SELF).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout) / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--thumbnail-bytes", type=int, default=20_000)
    parser.add_argument("--folder", default=None, help="Folder for the outputs; they take three times the thumbnails.")
    arguments = parser.parse_args()
    sizes = (arguments.rows, 4 * arguments.rows)
    peaks: dict[str, list[float]] = {step: [] for step in STEPS}
    for rows in sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            root = f"{temporary}/made"
            # In a process of its own: Python does not return all of the memory that this takes.
            code = f"from benchmarks.shard_memory import make; make({root!r}, {rows}, {arguments.thumbnail_bytes})"
            subprocess.run([sys.executable, "-c", code], check=True)
            for step in STEPS:
                peaks[step].append(measure(step, root))
    print(f"{'step':8s} {sizes[0]:>12,} {sizes[1]:>12,} rows")
    for step, (small, large) in peaks.items():
        print(f"{step:8s} {small:8.0f} MiB {large:8.0f} MiB  {large / small:5.2f}")
