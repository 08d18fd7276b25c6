"""Jobs for tests: inputs, planning without a run, the command line, and the rows of the output."""

from __future__ import annotations

import io
import random
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from typer.testing import CliRunner

from pipelines.config import JobConfig, load_config
from pipelines.output.output import Output
from pipelines.preparation import extend_plan
from pipelines.upkeep.verify import Report, verify_output
from sightline.cli import app
from sightline.demo.dataset import encode_image
from sightline.demo.shapes import LABELS
from siglip.checkpoint import pin_model
from storage.schemes import open_store
from storage.store import Store, StoreOptions, join

SHARE = {"actors.num_cpus": 1, "ray.readers": 2}
"""The resources of a job on `local_ray`. Ray keeps as many idle workers as it has unused CPUs. Because a job leaves
most CPUs unused, its workers stay for the next job, which then takes a third of the time."""


class RecordedProgress:
    """A progress display that prints nothing and records all calls."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.updates: list[dict[str, float | None]] = []

    def start(self, shards: int, rows: int) -> None:
        self.messages.append(f"{shards} shards, {rows} rows")

    def say(self, message: str) -> None:
        self.messages.append(message)

    def update(self, **done: float | None) -> None:
        self.updates.append(done)


class Place:
    """A folder of a store, local or on S3, with an `input` and an `output` folder in it.

    `folder` is a local folder for the job's YAML file. `keys` are settings of every job of this place.
    """

    def __init__(self, root: str, folder: Path) -> None:
        self.root = root
        self.folder = folder
        self.options = StoreOptions.from_environment()
        self.store: Store = open_store(root, self.options)
        self.input, self.output = join(root, "input"), join(root, "output")
        self.keys: dict[str, Any] = {}

    def put(self, name: str, data: bytes) -> str:
        """Write an input object. Returns its URI."""
        return self.store.put(join(self.input, name), data).uri

    def configure(self, **keys: Any) -> Path:
        """Write the job's YAML file with these settings, and return its path."""
        path = self.folder / "job.yaml"
        base = {"input": self.input, "output": self.output, "labels": list(LABELS), "max_reject_fraction": 1.0}
        path.write_text(yaml.safe_dump({**base, **self.keys, **keys}))
        return path

    def config(self, **keys: Any) -> JobConfig:
        """Return the validated configuration of a job with these settings that runs on `local_ray`."""
        return load_config(self.configure(**keys), SHARE)

    def plan(self, **keys: Any) -> None:
        """List the inputs and write the plan, without running the job."""
        config = self.config(**keys)
        extend_plan(config, Output(self.output, self.options), pin_model(config.model))

    def tag(self, *arguments: str, **keys: Any) -> subprocess.CompletedProcess[str]:
        """Run `sightline tag` in this process, on the `local_ray` of the tests."""
        share = [word for key, value in SHARE.items() for word in ("--set", f"{key}={value}")]
        return run_sightline("tag", str(self.configure(**keys)), *share, *arguments)

    def verify(self) -> Report:
        """Verify the output, as `sightline verify` does."""
        return verify_output(Output(self.output, self.options))

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Return all rows in the folder `data` or `rejects`, also those that are not committed."""
        return [
            row
            for entry in self.store.list(join(self.output, kind))
            for row in pq.read_table(io.BytesIO(self.store.read(entry.uri))).to_pylist()
        ]

    def keys_of(self, kind: str) -> Counter[str]:
        """Count how often each key occurs in the folder `data` or `rejects`."""
        return Counter(row["key"] for row in self.rows(kind))

    def parts(self) -> list[str]:
        """Return the URIs of the part files that have not been removed."""
        return [entry.uri for entry in self.store.list(join(self.output, "parts"))]


def run_sightline(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process.

    A process of its own would start its own Ray, which takes four times as long.
    """
    done = CliRunner().invoke(app, arguments)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def make_image(seed: int = 0) -> bytes:
    """Draw an image of a shape, and return its bytes."""
    rng = random.Random(seed)
    return encode_image(rng, rng.choice(LABELS))


def make_parquet(columns: dict[str, Any], **options: Any) -> bytes:
    """Build a Parquet file of these columns."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()
