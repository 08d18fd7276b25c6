"""Settings of the model and of image decoding, and scheduling of processes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, model_validator

from storage.settings import ConfigError, check_settings

_MOST_BYTES = 2**31 - 1
"""Most bytes of an image, encoded or as RGB: decoders count them in signed 32-bit numbers."""

LEAST_PATCHES, MOST_PATCHES = 4, 4096
"""Fewest and most patches that an image may be cut into at most. NaFlex models were trained with 128 to 1,024."""

LEAST_PATCH, MOST_PATCH = 2, 64
"""Smallest and largest side in pixels of the square patches of a NaFlex model."""

MOST_PIXELS = 4096
"""Largest width and height of images that `model.image_size` takes: 50 MB an image, and 65,536 patches of 16 pixels."""

MIN_COSINE = 0.99
"""Default of `model.min_cosine`. docs/performance.md says what it accepted and refused."""

DType = Literal["auto", "float32", "bfloat16", "int8"]


class ModelConfig(BaseModel):
    """Which checkpoint to load and how to run it.

    It does not choose a machine: a model runs on the device of the process that builds a `siglip.encoder.Encoder`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        "tiny",
        description="A hub id (google/siglip-base-patch16-256), a directory or an s3://, gs:// or az:// prefix with a "
        "checkpoint in the hub's file layout, or 'tiny': the checkpoint that ships with Sightline.",
    )
    revision: str | None = Field(
        None, description="A hub commit, tag or branch. Pin a commit, because a branch can change between two runs."
    )
    endpoint: str | None = Field(
        None,
        description="S3 endpoint of an s3:// source; null is AWS_ENDPOINT_URL, or AWS. A job sets its own endpoint.",
    )
    text_rule: Literal["auto", "canonicalize", "lowercase"] = Field(
        "auto",
        description="How texts are prepared: canonicalize is lower case without ASCII punctuation, lowercase is lower "
        "case, auto is canonicalize for SigLIP and lowercase for SigLIP 2. See docs/checkpoints.md.",
    )
    image_size: Annotated[int, Field(gt=0, le=MOST_PIXELS)] | None = Field(
        None,
        description="Another width and height in pixels than the checkpoint's own, a multiple of its patch. The table "
        "of positions is resized, so embeddings and scores are not those that the checkpoint was trained for. See "
        "docs/checkpoints.md.",
    )
    patches: int | None = Field(
        None,
        ge=LEAST_PATCHES,
        le=MOST_PATCHES,
        description="Most patches of an image, for NaFlex checkpoints only; null is the checkpoint's own number, which "
        "is 256. More patches show smaller details and take more time. See docs/checkpoints.md.",
    )
    dtype: DType = Field(
        "auto",
        description="auto is bfloat16 where the CPU or GPU has instructions for it, else float32. int8 is for CPUs "
        "with AVX-512 VNNI: faster, and not quite the same embeddings. See docs/performance.md.",
    )
    min_cosine: float = Field(
        MIN_COSINE,
        ge=-1,
        le=1,
        description="For int8: the lowest cosine that an image's embedding may have with that of bfloat16. It is "
        "measured when the model is loaded and on a run's first images, and an image below it refuses the model. "
        "Other dtypes have a bound of their own, and refuse this one.",
    )
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="Compile the vision tower with torch.compile. auto compiles where there is a C++ compiler and the "
        "job is long enough to save more than the minute or so that compiling takes.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto is the GPU if the process was given one that works, else the CPU."
    )
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Images in one forward pass, on a CPU rounded up to equal parts for its cores. auto is 256 on a "
        "GPU; on a CPU it is 8 or the number of cores, whichever is more, and 64 for a small model.",
    )


def _refuse_unused_bound(config: ModelConfig) -> ModelConfig:
    if config.dtype != "int8" and config.min_cosine != MIN_COSINE:
        raise ValueError(f"min_cosine is for dtype: int8, and dtype is {config.dtype}: leave min_cosine out")
    return config


ChosenModel = Annotated[ModelConfig, AfterValidator(_refuse_unused_bound)]
"""The settings of a model as a user chooses them: an option that would be ignored is refused.

`ModelConfig` itself takes it, because it is also read from outputs that earlier versions have written.
"""


def check_model(settings: Mapping[str, Any]) -> ModelConfig:
    """Check the settings of a model that a user gave to a command or a function, and return them.

    Raises `ConfigError`, also for a setting that would be ignored.
    """
    config = check_settings("model", settings, ModelConfig)
    try:
        return _refuse_unused_bound(config)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


class Limits(BaseModel):
    """Limits for one image. An image over a limit is rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_bytes: int = Field(64 * 2**20, gt=0, le=_MOST_BYTES, description="Largest encoded image, in bytes.")
    max_pixels: int = Field(
        64_000_000, gt=0, le=_MOST_BYTES // 3, description="Largest width times height, checked before decoding."
    )
    max_seconds: float = Field(30.0, gt=0, description="Longest time for decoding one image, in seconds.")


class PatchBudget(BaseModel):
    """How a NaFlex model sees an image: in its own proportions, as at most `count` square patches of `size` pixels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(ge=LEAST_PATCH, le=MOST_PATCH)
    count: int = Field(ge=LEAST_PATCHES, le=MOST_PATCHES)


class ImageSpec(BaseModel):
    """The preprocessing of a checkpoint: the part of `preprocessor_config.json` that SigLIP uses.

    It has either `size` or `patches`. All images of a model are arrays of one shape: see `shape`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int | None = Field(
        None,
        gt=0,
        description="Width and height, in pixels, that images are resized to without keeping their aspect ratio.",
    )
    patches: PatchBudget | None = None
    resample: int = Field(3, ge=0, le=5, description="Pillow's resampling filter: 3 is bicubic, 2 bilinear.")
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 0.5, 0.5)

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if (self.size is None) == (self.patches is None):
            raise ValueError("needs either size or patches")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the uint8 array that holds one image, which is C-contiguous.

        It is (S, S, 3) for a square of RGB pixels, and (T + 1, 3 * P * P) for T patches of P x P pixels, each in a row
        of its own, and a last row that says how they are arranged: see `siglip.images.patches`.
        """
        if self.patches is None:
            assert self.size is not None
            return self.size, self.size, 3
        return self.patches.count + 1, 3 * self.patches.size**2

    def describe(self) -> str:
        """Say in a few words what the model sees of an image."""
        if self.patches is None:
            return f"{self.size} x {self.size} pixels"
        return f"at most {self.patches.count} patches of {self.patches.size} x {self.patches.size} pixels"

    @property
    def bytes(self) -> int:
        """Size of one image's array, in bytes."""
        return math.prod(self.shape)


def count_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prefer_throughput() -> None:
    """Run this thread under SCHED_BATCH, so that it does not preempt running threads when it wakes up.

    Threads and processes that it starts later inherit the policy. The processes of a job wake each other for each
    image. A woken process would preempt another in the middle of an image, whose pixels would then be lost from the
    core's caches. With the policy, a job with the tiny model on two cores was 1.06 times as fast. It improves
    throughput and makes latency worse. Does nothing where the kernel does not have the policy or a sandbox refuses it.
    """
    if hasattr(os, "sched_setscheduler"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
