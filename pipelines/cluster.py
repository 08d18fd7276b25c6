"""The Ray that a run uses: a cluster that it joins, or one that it starts on this machine for itself."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.data import Dataset

from pipelines.config import ActorsConfig, RayConfig
from pipelines.ray_internals import (
    data_settings,
    keep_signals,
    own_code_first,
    quiet_core,
    quiet_data,
    warn_untested_ray,
)
from pipelines.sizing import Cluster, fit_cluster, fit_machine, local_cpus
from siglip.config import prefer_throughput
from storage.settings import ConfigError

READER_CPUS, COMMIT_CPUS = 0.9, 0.05
"""Logical CPUs of a reader task, and of a sink or commit task. Sinks and commits wait for the store most of the time,
and use the part of a CPU that a reader leaves. Without that part, on a node full of actors and readers, nothing was
written until a whole shard was read, and Ray ended the workers that waited: every other of six small shards took six
seconds."""
ACTOR_START_SECONDS = 3600
"""How long to wait for the first actors. An autoscaler may have to start a node and pull an image."""
BLOCK_BYTES, BLOCK_ROWS = 64 * 2**20, 1024
"""Ray Data's target size of a block: 341 images of 256 x 256 pixels, or up to 1,024 smaller ones. Smaller blocks have
more overhead. Larger ones delay receipts, and leave the actors without work until the first block is full."""
WAVE_BLOCKS = 1000
"""Input blocks of one dataset. Ray keeps an object and statistics for each of them as long as the dataset runs: with
100,000 blocks, it took 93 s to build the dataset, and 1.2 GiB."""
TOGETHER_ROWS = 64
"""Shards of fewer images are read several in a block, as long as these have about so many images together. A block of
its own costs a small shard about 70 ms of CPU time in Ray."""
BLOCKS_PER_READER = 4
"""The fewest input blocks for each reader, if there are so many shards: the readers then end at about the same time."""
RETRIES = 5
"""How often Ray may repeat a task or restart an actor whose process died. Ray's default has no limit."""


@contextmanager
def connect(
    config: RayConfig,
    actors: ActorsConfig | None = None,
    rows_per_shard: int = 4096,
    small: bool = False,
) -> Iterator[Cluster]:
    """Connect to Ray for the length of a `with` block, and yield what the run may use of it.

    Uses the process's Ray if there is one, else joins `config`'s cluster, which keeps running afterwards, else starts
    Ray on this machine and stops it afterwards. `small` tells whether the model is small. A local run puts the calling
    thread under the scheduling policy SCHED_BATCH for good: see `siglip.config.prefer_throughput`. Raises `ConfigError`
    if the cluster cannot be joined, or if this machine has too few GPUs.
    """
    warn_untested_ray()
    actors = actors or ActorsConfig()
    address = config.find_address()
    if ray.is_initialized():
        yield fit_cluster(config, actors)
        return
    try:
        with keep_signals(), quiet_core():
            if address:
                ray.init(address=address, job_config=own_code_first(), logging_level=logging.ERROR, log_to_driver=False)
            else:
                _start(config, actors)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"ray.address: cannot join {address}: {str(error).splitlines()[0]}") from error
    try:
        yield fit_cluster(config, actors) if address else fit_machine(config, actors, rows_per_shard, small)
    finally:
        ray.shutdown()


@contextmanager
def data_context(cluster: Cluster, image_bytes: int = BLOCK_BYTES) -> Iterator[None]:
    """Configure Ray Data for a run over images of `image_bytes` decoded bytes each. Restores the settings afterwards.

    Readers that start before the actors could take an actor's place, and then wait for that actor for ever. So readers
    wait until the pool has started, unless the cluster has room for all of them (`Cluster.reads_early`).
    """
    quiet_data()
    settings = {
        "target_max_block_size": min(BLOCK_BYTES, BLOCK_ROWS * image_bytes),
        "enable_progress_bars": False,
        "max_errored_blocks": 0,  # with more, Ray Data drops whole blocks silently
        "wait_for_min_actors_s": -1 if cluster.reads_early else ACTOR_START_SECONDS,
        "max_consecutive_actor_init_deaths": 3,
    }
    with data_settings(settings):
        yield


def iterate_rows(dataset: Dataset) -> Generator[dict[str, Any]]:
    """Yield a dataset's rows, those of each block as soon as the block is there.

    `Dataset.iter_rows` fetches one block ahead, and returns a block's rows only when the next block has come.
    """
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from block.to_pylist()


def _start(config: RayConfig, actors: ActorsConfig) -> None:
    # Ray's own processes inherit the policy. This process needs it too: it polls Ray Data's queue 100 times a second.
    prefer_throughput()
    ray.init(
        address="local",
        job_config=own_code_first(),
        num_cpus=local_cpus(config, actors),
        resources={name: amount * actors.largest for name, amount in actors.resources.items()} or None,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
