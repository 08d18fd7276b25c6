"""A job whose processes are killed: its inputs, its commands, and the check of its output."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.fs as pafs
import yaml

from pipelines.output.ledger import Ledger
from pipelines.output.output import Output
from pipelines.output.row_files import read_rows
from pipelines.upkeep.verify import verify_output
from sightline.demo.dataset import encode_image
from sightline.demo.shapes import LABELS
from storage.local import LocalStore
from storage.s3.store import S3Store
from storage.schemes import is_remote, open_store
from storage.store import StoreOptions, join
from tests.support.tars import make_tar

CONTEXT = multiprocessing.get_context("forkserver")
"""Each command is a process of its own, forked from one that has imported everything: it begins within milliseconds."""
CONTEXT.set_forkserver_preload(["sightline.cli", "pipelines.job", "sightline.metrics", __name__])
TARS, PER_TAR, LOOSE, LISTED, LATE = 8, 5, 5, 5, 2
"""The inputs of an episode: tars, images in each, loose images, and listed ones, of which some come late."""
ROWS_PER_SHARD = 5
COMMANDS = {
    "tag": ["tag", "{config}"],
    "retry": ["tag", "{config}", "--retry-rejects"],
    "compact": ["compact", "{out}"],
}
AIMS = {
    "tag": ("put_if_absent .*/plan/", "put .*/runs/", "put_if_absent .*/ledger/", "put .*/manifest", "delete ",
            "put_if_absent .*/(fingerprint|labels)"),
    "retry": ("put .*/runs/", "put_if_absent .*/ledger/", "put .*/manifest", "delete "),
    "compact": ("put .*/data/merged", "put .*/runs/", "put_if_absent .*/ledger/", "put .*/manifest", "delete "),
}  # fmt: skip
"""The driver's operations at which a command is killed: regular expressions over the method and the URI."""


@dataclass(frozen=True)
class Aim:
    """A kill of a driver at its operation number `skip` that matches `pattern`: `before`, `during` or `after` it."""

    pattern: str
    skip: int
    when: str

    def arm(self) -> None:
        """Make this process kill itself there."""
        left = self.skip

        def wrap(method: str, do: Callable[..., Any]) -> Callable[..., Any]:
            def do_or_die(store: Any, uri: str, *arguments: Any) -> Any:
                nonlocal left
                if not re.search(self.pattern, f"{method} {uri}"):
                    return do(store, uri, *arguments)
                left -= 1
                if left < 0 and self.when == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                if left < 0 and self.when == "during":
                    threading.Timer(random.uniform(0, 0.005), os.kill, [os.getpid(), signal.SIGKILL]).start()
                result = do(store, uri, *arguments)
                if left < 0 and self.when == "after":
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return do_or_die

        for store in (LocalStore, S3Store):
            for method in ("put", "put_if_absent", "delete"):
                setattr(store, method, wrap(method, getattr(store, method)))


def drive(arguments: list[str], log: str, aim: Aim | None) -> None:
    """Run the command line in this new process."""
    target = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(target, 1)
    os.dup2(target, 2)
    print(f"--- {arguments} {aim}", flush=True)
    if aim is not None:
        aim.arm()
    from sightline.cli import app

    app(arguments)


@dataclass
class Tally:
    """What is counted. `premature` are commands that ended with 0 although something was missing."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)
    checks: int = 0
    lost: int = 0
    doubled: int = 0
    premature: int = 0
    leftovers: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def note(self, problem: str) -> None:
        """Count and print a problem."""
        self.problems.append(problem)
        print(f"PROBLEM {problem}", flush=True)


class Images:
    """The inputs of an output, and what has become of them: digests of good images, and the number of bad ones.

    A list names images. Some of them come only in the next episode, so that their rows are rejected until then.
    """

    def __init__(self, root: str, options: StoreOptions, rng: random.Random) -> None:
        self.store, self.root, self.rng = open_store(root, options), root, rng
        self.good: set[str] = set()
        self.bad = 0
        self.late: dict[str, bytes] = {}
        self.listed: list[str] = []
        self.episode = 0

    def grow(self) -> None:
        """Write the late images of the last episode, and the inputs of the next one."""
        for uri, data in self.late.items():
            self.store.put(uri, data)
        self.late.clear()
        self.episode += 1
        folder = join(self.root, "in", f"{self.episode}")
        for tar in range(TARS):
            images = [self._draw() for _ in range(PER_TAR)]
            self.store.put(join(folder, f"{tar}.tar"), make_tar((f"{n}.jpg", data) for n, data in enumerate(images)))
        for number in range(LOOSE):
            self.store.put(join(folder, f"{number}.jpg"), self._draw() if number else b"no image")
        self.bad += 1
        for number in range(LISTED):
            uri = join(self.root, "listed", f"{self.episode}-{number}.jpg")
            self.listed.append(uri)
            if number < LATE:
                self.late[uri] = self._draw()
            else:
                self.store.put(uri, self._draw())
        self.store.put(join(self.root, "list.txt"), "\n".join(self.listed).encode())

    def _draw(self) -> bytes:
        data = encode_image(self.rng, self.rng.choice(LABELS))
        self.good.add(hashlib.sha256(data).hexdigest())
        return data


class Job:
    """A job with its own output, on a Ray that it shares with others."""

    def __init__(self, root: str, folder: Path, rng: random.Random) -> None:
        self.options = StoreOptions.from_environment()
        self.images = Images(root, self.options, rng)
        self.output = Output(join(root, "out"), self.options)
        self.config, self.log = folder / "job.yaml", folder / "log.txt"
        self.config.write_text(
            yaml.safe_dump(
                {
                    "input": [join(root, "in"), join(root, "list.txt")],
                    "output": self.output.uri,
                    "labels": list(LABELS),
                    "rows_per_shard": ROWS_PER_SHARD,
                    "max_reject_fraction": 1.0,
                    "on_missing": "reject",
                    "actors": {"num_cpus": 1},
                    "ray": {"readers": 2},
                }
            )
        )

    def start(self, name: str, aim: Aim | None = None) -> Any:
        """Start a command, and return its process."""
        arguments = [word.format(config=self.config, out=self.output.uri) for word in COMMANDS[name]]
        process = CONTEXT.Process(target=drive, args=(arguments, str(self.log), aim), name=name)
        process.start()
        return process

    def check(self, story: str, tally: Tally, *, retried: bool) -> None:
        """Check the output after commands that ended with 0. `retried` tells that a retry was among them."""
        tally.checks += 1
        before = len(tally.problems)
        good, rejected = self.images.good, self.images.bad + (len(self.images.late) if retried else 0)
        late = {hashlib.sha256(data).hexdigest() for data in self.images.late.values()}
        ledger = self._read_ledger()
        folder = Counter(row for row in self._read_folder())
        for name, found in (("ledgers", ledger["data"]), ("folder", folder)):
            lost = good - late - found.keys() if retried else set()
            tally.lost += len(lost)
            twice = {digest: count for digest, count in found.items() if count > 1}
            if lost or twice or found.keys() - good:
                tally.doubled += len(twice)
                tally.note(f"{story}: {name}: {len(lost)} lost, {len(twice)} doubled")
        rows = sum(ledger["data"].values()) + sum(ledger["rejects"].values())
        if rows != len(good) + self.images.bad:
            tally.lost += max(0, len(good) + self.images.bad - rows)
            tally.note(f"{story}: {rows} rows of {len(good) + self.images.bad}")
        if retried and sum(ledger["rejects"].values()) != rejected:
            tally.note(f"{story}: {sum(ledger['rejects'].values())} rejects, not {rejected}")
        if max(ledger["rejects"].values(), default=1) > 1:
            tally.note(f"{story}: a reject is there twice")
        report = verify_output(self.output)
        if not report.ok or report.orphans:
            tally.note(f"{story}: verify: {report.problems}")
        tally.premature += len(tally.problems) > before

    def _read_ledger(self) -> dict[str, Counter[str]]:
        found: dict[str, Counter[str]] = {"data": Counter(), "rejects": Counter()}
        for _, file in Ledger.read(self.output).list_files():
            columns = ["sha256"] if file.kind == "data" else ["source", "key"]
            for rows in read_rows(self.output, file, columns):
                found[file.kind].update(" ".join(row.values()) for row in rows.to_pylist())
        return found

    def _read_folder(self) -> Iterator[str]:
        uri = join(self.output.uri, "data")
        files: Any = pafs.LocalFileSystem()
        if is_remote(uri):
            endpoint = (self.options.endpoint or "").removeprefix("http://")
            files = pafs.S3FileSystem(endpoint_override=endpoint, scheme="http", region="us-east-1")
        table = ds.dataset(uri.removeprefix("s3://"), filesystem=files, format="parquet").to_table(["sha256"])
        yield from table["sha256"].to_pylist()
