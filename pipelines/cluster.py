"""Ray: joining a cluster, or starting one here for one run."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import DataContext, Dataset

from pipelines.config import ActorsConfig, JobConfig, ray_address
from pipelines.worker_path import own_code_first
from siglip.config import count_cores, prefer_throughput
from storage.settings import ConfigError

LOGICAL_CPUS = 4
"""Declared CPUs for each that a local run uses. Ray Data sets half of them aside, in equal parts for each stage, so
that with just enough of them one reader runs where two should; the stages' real limits are set on the stages."""
READER_CPUS, COMMIT_CPUS = 0.9, 0.05
"""Logical CPUs of a reader, and of a sink or commit task. These wait for the store, and find room in what a reader
leaves of its CPU. Without it, on a node that actors and readers fill, nothing was written until a shard was read, and
Ray ended the workers that waited for their turn: every other of six small shards took six seconds."""

ACTOR_START_SECONDS = 3600
"""How long to wait for the first actors: an autoscaler may have to bring a node up and pull an image."""
BLOCK_BYTES, BLOCK_ROWS = 64 * 2**20, 1024
"""Ray Data's target block: 341 images of 256 x 256, or so many smaller ones. Smaller blocks cost overhead; larger ones
delay receipts, and leave actors without work until the first is full."""
RETRIES = 5
"""How often Ray may replay a task or restart an actor whose process died. Its default is for ever."""


@dataclass(frozen=True)
class Cluster:
    """What a run may use: shards read at once, or None for as many as there is room for, and decoders for each of them;
    the pool of actors, and cores and GPUs for each of those.

    A cluster grows and shrinks while a job runs, so that a number taken at the start would leave later nodes idle.
    With `reads_early` the first shards are read while the actors load the model.
    """

    readers: int | None
    actors: ActorsConfig
    actor_cpus: float
    actor_gpus: float
    decoders: int = 1
    reads_early: bool = False

    def count_readers(self) -> int:
        """Shards read at once, as far as the cluster lets it now. Needs a connected Ray."""
        return self.readers or max(1, int(ray.cluster_resources().get("CPU", 0)))

    def count_tasks(self, shards: int) -> int:
        """Tasks that may take so many shards: one for each, and no more at once than shards are read."""
        return min(self.readers or shards, shards)

    def count_decoders(self) -> int:
        """Images decoded at once, by all those readers."""
        return self.count_readers() * self.decoders


@contextmanager
def connect(config: JobConfig, small: bool = False) -> Iterator[Cluster]:
    """A Ray to run on, for the length of a `with`, with a `small` model or not. A joined cluster is left running.

    A Ray started here declares more logical CPUs than the machine has: room for a reader for each core and for all the
    actors. Without a GPU both want the same cores, one or the other is the bottleneck, and the operating system shares
    them better than reservations would. The calling thread then yields to others as they do, and goes on so afterwards:
    see `siglip.config.prefer_throughput`. Raises `ConfigError`.
    """
    address = ray_address(config)
    if ray.is_initialized():
        yield _fit(config)
        return
    try:
        with keep_sigterm(), _quiet_core():
            if address:
                ray.init(address=address, job_config=own_code_first(), logging_level=logging.ERROR, log_to_driver=False)
            else:
                _start(config)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"ray.address: cannot join {address}: {str(error).splitlines()[0]}") from error
    try:
        yield _fit(config) if address else _fit_here(config, small)
    finally:
        ray.shutdown()


@contextmanager
def keep_sigterm() -> Iterator[None]:
    """`ray.init` takes SIGTERM for itself, and would end the process with code 15 and a stack: it stays the caller's.

    Ray's core has a handler below Python's, and setting Python's again takes that one out too.
    """
    if threading.current_thread() is not threading.main_thread():  # Ray leaves signals alone there
        yield
        return
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as exit_:
        if exit_.code == signal.SIGTERM and callable(ours):  # it came while Ray was starting
            ours(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, ours)


@contextmanager
def _quiet_core() -> Iterator[None]:
    """Ray Data keeps its actors' arguments in the object store, and Ray's core logs an error about that for each.

    The level that silences it is read once, by `ray.init`, and announced on the standard error, which is silenced too.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@contextmanager
def data_context(cluster: Cluster, image_bytes: int = BLOCK_BYTES) -> Iterator[None]:
    """Ray Data's settings for a run over images of so many bytes; put back afterwards, because they belong to the whole
    process.

    Readers that start while an actor has no place yet could take it, and wait for that actor for ever: so they wait
    until the pool is there, except on a cluster that has room for all.
    """
    warnings.filterwarnings("ignore", ".*ray_remote_args.*", category=DeprecationWarning)  # retries have no other way
    context = DataContext.get_current()
    # What ends a run is raised, and becomes one line; Ray Data would log its stack before that.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    settings = {
        "target_max_block_size": min(BLOCK_BYTES, BLOCK_ROWS * image_bytes),
        "enable_progress_bars": False,
        "max_errored_blocks": 0,  # more would drop whole blocks without a word
        "wait_for_min_actors_s": -1 if cluster.reads_early else ACTOR_START_SECONDS,
        "max_consecutive_actor_init_deaths": 3,
    }
    before = {name: getattr(context, name) for name in settings}
    for name, value in settings.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def iterate_rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """A dataset's rows, each block's as soon as it is there.

    `iter_rows` fetches a block ahead, and keeps each until the next one has come.
    """
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from block.to_pylist()


def _start(config: JobConfig) -> None:
    actors = config.actors
    cpus = LOGICAL_CPUS * (
        (config.ray.readers or count_cores()) + max(count_cores(), actors.largest * (actors.num_cpus or 1))
    )
    # For Ray's own processes, and for this one, which looks at Ray Data's queue a hundred times a second.
    prefer_throughput()
    ray.init(
        address="local",
        job_config=own_code_first(),
        num_cpus=int(-(-cpus // 1)),
        resources={name: amount * actors.largest for name, amount in actors.resources.items()} or None,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


def _fit_here(config: JobConfig, small: bool) -> Cluster:
    """This machine, shared between its readers and its actors. Raises `ConfigError` when it has too few GPUs."""
    gpus, available = _actor_gpus(config.actors), ray.cluster_resources().get("GPU", 0)
    actors = config.actors if gpus else config.actors.spread(count_cores(), small)
    if gpus * actors.smallest > available:
        raise ConfigError(
            f"actors.num_gpus: {actors.smallest} x {gpus:g} GPUs asked for and this machine has {available:g}: "
            "set it to 0, or join a cluster with ray.address"
        )
    cpus = actors.num_cpus or (1 if gpus else max(1, count_cores() // actors.largest))
    readers, decoders = config.spread_readers(count_cores())
    # There is room for all here. A large model is compiled first, which reading would only slow down.
    return Cluster(readers, actors, cpus, gpus, decoders, reads_early=small and not gpus)


def _actor_gpus(actors: ActorsConfig) -> float:
    wanted = actors.num_gpus
    return float(ray.cluster_resources().get("GPU", 0) >= actors.smallest) if wanted is None else wanted


def _fit(config: JobConfig) -> Cluster:
    """Defaults for a cluster that exists: the most cores for each actor with which all find room beside a reader.

    Knows the nodes that are there, not those that an autoscaler may bring: for such a cluster set `actors.num_cpus`.
    """
    actors = config.actors
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [int(node.get("CPU", 0)) - 1 for node in nodes if all(name in node for name in actors.resources)]
    fitting = (
        count for count in range(max(cores, default=1), 1, -1) if sum(n // count for n in cores) >= actors.largest
    )
    gpus = _actor_gpus(actors)
    return Cluster(config.ray.readers, actors, actors.num_cpus or (1 if gpus else next(fitting, 1)), gpus)
