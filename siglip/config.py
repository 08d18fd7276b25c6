"""What a user says about the model, and what a checkpoint says about itself."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

DType = Literal["auto", "float32", "bfloat16"]


class ModelConfig(BaseModel):
    """Which checkpoint to load and how to run it.

    Knows nothing of where it runs: the device is whatever the process that builds the
    `siglip.encoder.Encoder` was given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        "tiny",
        description="A hub id (google/siglip-base-patch16-256), a directory, an s3:// prefix that holds a "
        "checkpoint in the hub's file layout, or 'tiny': the checkpoint that ships with Sightline.",
    )
    revision: str | None = Field(
        None, description="A hub commit, tag or branch. Pin the commit: a branch can move between two nights."
    )
    endpoint: str | None = Field(
        None, description="S3 endpoint of an s3:// source; null is AWS_ENDPOINT_URL, or AWS. A job fills in its own."
    )
    dtype: DType = Field(
        "auto", description="auto is bfloat16 where the CPU or GPU multiplies it natively, else float32."
    )
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="torch.compile the vision tower. auto compiles when a compiler is there and the job is long "
        "enough to earn back the minute or so that it takes.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto is the GPU where the process was given one that works, else the CPU."
    )
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Images in one forward pass; on a CPU as many more as it takes for equal parts for its cores. auto "
        "is 256 on a GPU; on a CPU 8 or one for each core, or 64 of a small model.",
    )


class Limits(BaseModel):
    """What one image may cost before it is rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_bytes: int = Field(64 * 2**20, gt=0, description="Encoded bytes of one image.")
    max_pixels: int = Field(64_000_000, gt=0, description="Width times height of one image, before decoding it.")
    max_seconds: float = Field(30.0, gt=0, description="Seconds that one image may take to decode.")


class ImageSpec(BaseModel):
    """How a checkpoint wants its pixels: the part of `preprocessor_config.json` that SigLIP uses."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(gt=0, description="Both sides, in pixels, of the square the image is squashed to.")
    resample: int = Field(3, ge=0, le=5, description="Pillow's resampling filter: 3 is bicubic, 2 bilinear.")
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 0.5, 0.5)


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prefer_throughput() -> None:
    """Ask the kernel that this thread, and threads and processes that it starts, take no running one's core on waking.

    A job's processes wake each other for each image, and each that is woken would take the core of one in the midst of
    an image, whose pixels are then no longer in the core's caches: on two cores a job with the tiny model was 1.06
    times as fast. It is for throughput: what waits for its turn answers later. Does nothing where the kernel knows no
    such policy, or a sandbox refuses it.
    """
    if hasattr(os, "sched_setscheduler"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
