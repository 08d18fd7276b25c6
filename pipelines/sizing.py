"""How many readers, decoders and actors a run has, and how many CPUs and GPUs each of them gets.

Explicit settings are always used as they are. The defaults depend on the machine, or on the cluster's nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from pipelines.config import ActorsConfig, RayConfig
from siglip.config import count_cores
from storage.settings import ConfigError

LOCAL_CPU_FACTOR = 4
"""Logical CPUs that a local Ray declares for each CPU that readers and actors use. Ray Data reserves half of the CPUs
in equal parts for its stages. Without spare CPUs, one reader runs where two should. Each stage has its own limit, so
the spare CPUs do not start more tasks."""
MAX_LOCAL_ACTORS = 8
"""The most actors that a run on one machine starts by default. Each one holds the model in memory."""
SMALL_MODEL_CORES = 4
"""Cores for each actor of a small model. One thread of such a model keeps up with the decoders of a few cores."""
LARGE_SHARD_ROWS = 2048
"""Shards of this many rows or more are read with `LARGE_SHARD_DECODERS` decoders for each reader."""
LARGE_SHARD_DECODERS = 2


@dataclass(frozen=True)
class Cluster:
    """What a run may use of a Ray cluster.

    `readers` is the number of shards read at once, or None for as many as there is room for: a cluster grows and
    shrinks while a job runs, and a number taken at the start would leave later nodes idle. `decoders` is the number of
    decoder processes for each reader. `actors` is the pool; each actor has `actor_cpus` and `actor_gpus`. If
    `reads_early` is true, the first shards are read while the actors load the model.
    """

    readers: int | None
    actors: ActorsConfig
    actor_cpus: float
    actor_gpus: float
    decoders: int = 1
    reads_early: bool = False

    def count_readers(self) -> int:
        """Return the number of shards that can be read at once now. Needs a connected Ray."""
        return self.readers or max(1, int(ray.cluster_resources().get("CPU", 0)))

    def count_tasks(self, shards: int) -> int:
        """Return the concurrency of a stage that handles `shards` shards: at most one task for each shard."""
        return min(self.readers or shards, shards)

    def count_decoders(self) -> int:
        """Return the number of images that can be decoded at once now. Needs a connected Ray."""
        return self.count_readers() * self.decoders


def local_cpus(config: RayConfig, actors: ActorsConfig) -> int:
    """Return the logical CPUs that a local Ray declares: room for all readers and all actors, and spare ones.

    Without a GPU readers and actors want the same cores, and one of the two stages limits the job. The operating system
    shares the cores between them better than reservations would.
    """
    cores = count_cores()
    wanted = LOCAL_CPU_FACTOR * ((config.readers or cores) + max(cores, actors.largest * (actors.num_cpus or 1)))
    return int(-(-wanted // 1))


def local_actors(actors: ActorsConfig, cores: int, small: bool) -> ActorsConfig:
    """Return the pool for a machine without a GPU: by default one actor for each two cores, up to `MAX_LOCAL_ACTORS`.

    With the base model on two cores, one actor that splits its batches over both cores was 1.06 times as fast as two
    actors with one core each. It also started 10 s sooner, because the two compiled the same code. For a `small` model
    the default is one actor for each `SMALL_MODEL_CORES` cores, because each actor takes seconds to start: on two cores
    a job of 12,000 images was 1.2 times as fast with one actor as with two.
    """
    if any(value is not None for value in (actors.min, actors.max, actors.initial, actors.num_cpus)):
        return actors
    if small:
        return actors.model_copy(update={"min": min(-(-cores // SMALL_MODEL_CORES), MAX_LOCAL_ACTORS), "num_cpus": 1})
    return actors.model_copy(update={"min": min(max(1, cores // 2), MAX_LOCAL_ACTORS)})


def local_readers(readers: int | None, rows_per_shard: int, cores: int) -> tuple[int, int]:
    """Return the number of readers on one machine, and of decoders for each: by default one decoder for each core.

    A reader works a fifth as long on an image as a decoder, and each reader is one more process that competes for the
    cores. In shards of 3,000 rows, the tiny model's job on two cores was 1.16 times as fast with one reader and two
    decoders as with two readers of one decoder. But a reader takes a quarter of a second from one shard to the next, in
    which another reader can go on: in shards of 200 rows, two readers were 1.2 times as fast.
    """
    if readers is not None:
        return readers, 1
    decoders = min(LARGE_SHARD_DECODERS, cores) if rows_per_shard >= LARGE_SHARD_ROWS else 1
    return -(-cores // decoders), decoders


def fit_machine(config: RayConfig, actors: ActorsConfig, rows_per_shard: int, small: bool) -> Cluster:
    """Return the sizes for a Ray that was started on this machine. Raises `ConfigError` if it has too few GPUs."""
    gpus, available = _actor_gpus(actors), ray.cluster_resources().get("GPU", 0)
    actors = actors if gpus else local_actors(actors, count_cores(), small)
    if gpus * actors.smallest > available:
        raise ConfigError(
            f"actors.num_gpus: {actors.smallest} x {gpus:g} GPUs asked for and this machine has {available:g}: "
            "set it to 0, or join a cluster with ray.address"
        )
    cpus = actors.num_cpus or (1 if gpus else max(1, count_cores() // actors.largest))
    readers, decoders = local_readers(config.readers, rows_per_shard, count_cores())
    # Readers cannot take an actor's place here. A large model is compiled first, which reading would only slow down.
    return Cluster(readers, actors, cpus, gpus, decoders, reads_early=small and not gpus)


def fit_cluster(config: RayConfig, actors: ActorsConfig) -> Cluster:
    """Return the sizes for an existing cluster.

    Without `actors.num_cpus` and without GPUs, each actor gets the largest number of cores with which all actors fit on
    the nodes, with one core of each node left for a reader. Only nodes that are there now are considered: for a cluster
    with an autoscaler, set `actors.num_cpus`.
    """
    nodes: list[dict[str, Any]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [int(node.get("CPU", 0)) - 1 for node in nodes if all(name in node for name in actors.resources)]
    fitting = (
        count for count in range(max(cores, default=1), 1, -1) if sum(n // count for n in cores) >= actors.largest
    )
    gpus = _actor_gpus(actors)
    return Cluster(config.readers, actors, actors.num_cpus or (1 if gpus else next(fitting, 1)), gpus)


def _actor_gpus(actors: ActorsConfig) -> float:
    wanted = actors.num_gpus
    return float(ray.cluster_resources().get("GPU", 0) >= actors.smallest) if wanted is None else wanted
