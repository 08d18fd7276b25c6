"""Ray and the label set of a run, each made ready once: before a new output is claimed, else when they are needed."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import ray

from pipelines.cluster import ACTOR_START_SECONDS, RETRIES, connect
from pipelines.config import JobConfig
from pipelines.output.labels import LabelTable, make_label_table
from pipelines.progress import Progress
from pipelines.sizing import Cluster
from siglip.checkpoint import PinnedModel
from siglip.checkpoints.files import CheckpointError
from siglip.config import ModelConfig
from siglip.labels import LabelError, LabelSet
from siglip.scoring import Floats, Scale
from storage.settings import ConfigError


class Startup:
    """What a run starts before its first image. `stack` ends what was started.

    A new output is claimed by `fingerprint.json`, after which its settings cannot be changed. So `prepare` is called
    before: a machine, a cluster or a checkpoint that cannot be used is then found while nothing is written.
    """

    def __init__(self, config: JobConfig, progress: Progress, stack: ExitStack) -> None:
        self._config = config
        self._progress = progress
        self._stack = stack
        self._cluster: Cluster | None = None
        self._labels: LabelTable | None = None
        self._checked = False

    def connect(self, model: PinnedModel) -> Cluster:
        """Start Ray or join the cluster, at the first call. Raises `ConfigError`."""
        if self._cluster is None:
            config = self._config
            self._progress.say("starting Ray")
            context = connect(config.ray, config.actors, config.rows_per_shard, model.is_small)
            self._cluster = self._stack.enter_context(context)
            self._progress.say("loading the model")
        return self._cluster

    def check_machine(self, model: PinnedModel) -> None:
        """Check, at the first call, that an actor finds a node with what the model's settings need.

        Raises `ConfigError`.
        """
        cluster = self.connect(model)
        if not self._checked:
            # Only this task has a time limit, which is for finding a node: embedding many labels may take longer.
            run_like_actor(_check_machine, cluster, model.config, cluster.actor_gpus, seconds=ACTOR_START_SECONDS)
        self._checked = True

    def prepare(self, model: PinnedModel) -> LabelTable:
        """Check the machine and embed the label set, at the first call. Return its table, which is not yet written.

        Labels are embedded by a Ray task with an actor's resources and not by the driver, which may be a small pod
        without memory for torch. Raises `ConfigError`, and `LabelError` for a probe of another model.
        """
        if self._labels is None:
            cluster = self.connect(model)
            self.check_machine(model)
            threads, labels = max(1, int(cluster.actor_cpus)), self._config.labels
            texts, scale = run_like_actor(_embed_labels, cluster, model, labels, threads, cluster.actor_gpus)
            self._labels = make_label_table(labels, texts, scale, model)
        return self._labels


@ray.remote(max_retries=RETRIES)
def _embed_labels(model: PinnedModel, labels: LabelSet, threads: int, gpus: float) -> tuple[Floats, Scale]:
    import torch

    from siglip.cpu import release_memory
    from siglip.encoder import Encoder

    torch.set_num_threads(threads)
    config = model.config.model_copy(update={"compile": False})
    encoder = Encoder(replace(model, config=config), gpus=gpus)
    encoder.warm_up()
    found = encoder.embed_labels(labels, lambda warning: None), encoder.scale  # `find_work` has said it
    del encoder
    release_memory()  # Ray keeps the process, beside the actors
    return found


@ray.remote(max_retries=RETRIES)
def _check_machine(model: ModelConfig, gpus: float) -> None:
    from siglip.encoder import check_machine

    check_machine(model, gpus)


def run_like_actor(task: Any, cluster: Cluster, *arguments: Any, seconds: float | None = None) -> Any:
    """Run a Ray task with the resources of an actor, and return its result.

    Raises `ConfigError` if the task has not ended within `seconds`, which means that no node has room for an actor, and
    for the task's errors about the checkpoint or the labels.
    """
    resources = cluster.actors.resources
    cpus, gpus = cluster.actor_cpus, cluster.actor_gpus
    result = task.options(num_cpus=cpus, num_gpus=gpus, resources=resources).remote(*arguments)
    try:
        return ray.get(result, timeout=seconds)
    except ray.exceptions.GetTimeoutError as error:
        ray.cancel(result)
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in {"CPUs": cpus, "GPUs": gpus, **resources}.items())
        raise ConfigError(
            f"actors: no node had room for one of {wanted} within {seconds:g} seconds: ask for less, or add such a node"
        ) from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (CheckpointError, LabelError)):
            raise ConfigError(str(error.cause)) from error
        raise
