"""The first images of a run, on which `model.dtype: int8` is compared with bfloat16 before any image is tagged."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import chain, islice

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from pipelines.cluster import READER_CPUS, RETRIES
from pipelines.planning.plan import ShardRef
from pipelines.preparation import Work
from pipelines.progress import Progress
from pipelines.ray_internals import READER_ENVIRONMENT
from pipelines.sizing import Cluster
from pipelines.stages.reader import ReaderConfig, read_shard
from pipelines.stages.tagger import TaggerConfig, pixels_of
from pipelines.startup import run_like_actor
from siglip.checkpoints.fidelity import Fidelity, measure_fidelity

IMAGES, SHARDS = 32, 16
"""How many images are compared, and from how many shards they may come, if these have few images."""
MORE_SHARDS = 256
"""How many other shards of the run are read, with equal distances, if the first ones have no image at all."""


def check_first_images(
    work: Work, cluster: Cluster, reader: ReaderConfig, tagger: TaggerConfig, progress: Progress
) -> Fidelity | None:
    """Measure what the model's dtype costs on the first `IMAGES` images of a run. None if it is not int8.

    They are read and decoded twice, here and by the run. If the first `SHARDS` shards have no image that can be
    decoded, up to `MORE_SHARDS` others are read until one has. Also None, with a message, if none has. Raises
    `ConfigError` if a cosine is below `model.min_cosine`.
    """
    if tagger.model.config.dtype != "int8":
        return None
    if tagger.model.config.compile is False:
        progress.say("int8 is not faster in this run, which does not compile: it is short, or model.compile is false")
    progress.say(f"comparing int8 with bfloat16 on the first {IMAGES} images")
    config = replace(reader, deadline=None)
    refs = _take_shards(work, 0, 1, SHARDS)
    pixels = ray.get(_read_images.remote(refs, config, len(refs)))
    looked_at = len(refs)
    if not len(pixels) and work.shards > SHARDS:
        progress.say(f"there is no image in the first {looked_at} shards: looking for one in others")
        step = -(-(work.shards - SHARDS) // MORE_SHARDS)
        refs = _take_shards(work, SHARDS, step, MORE_SHARDS)
        pixels = ray.get(_read_images.remote(refs, config, 1))
        looked_at += len(refs)
    if not len(pixels):
        progress.say(
            f"int8 was not compared with bfloat16, and model.min_cosine not applied to this run: there is no image in "
            f"the {looked_at} shards that were read for it"
        )
        return None
    fidelity: Fidelity = run_like_actor(_measure, cluster, tagger, pixels)
    progress.say(fidelity.describe())
    return fidelity


def _take_shards(work: Work, start: int, step: int, most: int) -> list[ShardRef]:
    """The shards of a run from number `start` on, each `step`th, at most `most`."""
    refs = chain.from_iterable(chain.from_iterable(work.waves(1)))
    return [*islice(refs, start, start + step * most, step)]


# A process of its own for each, which ends with the task: decoders have images in work that nobody takes any more, and
# a model's memory is not free before its process ends.
@ray.remote(num_cpus=READER_CPUS, max_retries=RETRIES, max_calls=1, runtime_env=READER_ENVIRONMENT)
def _read_images(refs: list[ShardRef], reader: ReaderConfig, shards: int) -> NDArray[np.uint8]:
    """Read the first `IMAGES` images, or all of the first `shards` shards that have any: uint8 (N, *spec.shape)."""
    found: list[NDArray[np.uint8]] = []
    for ref in refs:
        block, before = pa.table({"refs": [[asdict(ref)]]}), len(found)
        for table in read_shard(block, reader):
            found += list(pixels_of(table["pixels"], reader.spec.shape))
            if len(found) >= IMAGES:
                return np.stack(found[:IMAGES])
        shards -= len(found) > before
        if not shards:
            break
    return np.stack(found) if found else np.zeros((0, *reader.spec.shape), np.uint8)


@ray.remote(max_retries=RETRIES, max_calls=1)
def _measure(tagger: TaggerConfig, pixels: NDArray[np.uint8]) -> Fidelity:
    import torch

    torch.set_num_threads(tagger.threads)
    fidelity = measure_fidelity(tagger.model, pixels, tagger.labels, tagger.head)
    fidelity.check(tagger.model.config.min_cosine)
    return fidelity
