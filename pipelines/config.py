"""A job's configuration: one YAML file, checked before any work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from siglip.config import Limits, ModelConfig
from siglip.images.decode import DecodeMode
from siglip.labels import LabelSet
from storage.settings import check_settings, override_key, read_settings

DEFAULT_THUMBNAIL = 256
MOST_SPREAD, CORES_FOR_SMALL = 8, 4
DECODERS, LARGE_SHARD = 2, 2048
OWN_COLUMNS = frozenset(
    [
        "key",
        "source",
        "row",
        "width",
        "height",
        "labels",
        "scores",
        "sha256",
        "embedding",
        "metadata",
        "thumbnail",
        "bands",
    ],
)
"""The columns of every output."""


class ActorsConfig(BaseModel):
    """The pool of actors that run the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: int | None = Field(
        None,
        ge=1,
        description="The pool never shrinks below this; null is 1, and where Ray is started here, without a GPU and "
        "with no max, initial or num_cpus, one for each two cores (of a small model for each four), up to 8.",
    )
    max: int | None = Field(None, ge=1, description="The pool grows up to this under load; null is min.")
    initial: int | None = Field(None, ge=1, description="Actors to start with; null is min. Ask for what you want.")
    num_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs for each actor; a fraction shares one; null is 1 where the cluster has them now, else 0.",
    )
    num_cpus: float | None = Field(
        None, gt=0, description="Cores for each actor; null is 1 beside a GPU, else what the nodes that are there have."
    )
    resources: dict[str, float] = Field({}, description="Custom Ray resources for each actor.")

    @model_validator(mode="after")
    def _check(self) -> ActorsConfig:
        if self.max is not None and self.max < self.smallest:
            raise ValueError(f"actors.max is {self.max}, less than actors.min {self.min}")
        if self.initial is not None and not self.smallest <= self.initial <= self.largest:
            raise ValueError(f"actors.initial is {self.initial}, not between actors.min and actors.max")
        return self

    @property
    def smallest(self) -> int:
        """The fewest actors that the pool may hold."""
        return self.min or 1

    @property
    def largest(self) -> int:
        """The most actors that the pool may hold."""
        return self.max if self.max is not None else max(self.smallest, self.initial or 1)

    def spread(self, cores: int, small: bool) -> ActorsConfig:
        """The pool for a machine without a GPU: where nothing else is asked for, an actor for each two cores.

        The base model's job on two cores was 1.06 times as fast with one actor, whose cores take parts of its batches,
        as with two of one core; and it started 10 s sooner, because they compiled the same. More than a few would take
        too much memory. Of a small model one thread keeps up with the decoders of a few cores, and each actor costs
        seconds to start: on two cores a job of 12,000 images was 1.2 times as fast with one as with two.
        """
        if any(value is not None for value in (self.min, self.max, self.initial, self.num_cpus)):
            return self
        if small:
            return self.model_copy(update={"min": min(-(-cores // CORES_FOR_SMALL), MOST_SPREAD), "num_cpus": 1})
        return self.model_copy(update={"min": min(max(1, cores // 2), MOST_SPREAD)})


class ParquetConfig(BaseModel):
    """How to read Parquet inputs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_column: str | None = Field(
        None, description="Image bytes, a struct {bytes, path}, or URIs; null finds the one that looks like it."
    )
    key_column: str | None = Field(None, description="Becomes `key`; null is the struct's path, or the row's number.")
    columns: dict[str, str] = Field(
        {}, description="Columns to pass through to the output: a list of names, or {name: name in the output}."
    )

    @field_validator("columns", mode="before")
    @classmethod
    def _names_stay(cls, value: Any) -> Any:
        return {name: name for name in value} if isinstance(value, (list, tuple)) else value

    @model_validator(mode="after")
    def _check(self) -> ParquetConfig:
        names = list(self.columns.values())
        for source, name in self.columns.items():
            if name in OWN_COLUMNS:
                raise ValueError(
                    f"columns: {name!r} is a column of every output: give yours another name, "
                    f"columns: {{{source}: original_{name}}}"
                )
            if not name or names.count(name) > 1:
                raise ValueError(f"columns: {name!r} is no name, or that of two columns")
        return self


class S3Config(BaseModel):
    """The object store. Credentials come from the environment, a profile or a role: never from here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: str | None = Field(None, description="Endpoint URL; null is AWS_ENDPOINT_URL, or AWS itself.")
    region: str | None = Field(None, description="Region; null is AWS_REGION or the profile's.")


class RayConfig(BaseModel):
    """Where to run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str | None = Field(
        None, description="An existing cluster; null is RAY_ADDRESS, or a Ray started here for this run alone."
    )
    readers: int | None = Field(
        None,
        ge=1,
        description="Shards read at once; null is one for each core where Ray is started here, or for each two, with "
        "two decoders, if shards are large; on a cluster as many as there is room for, also on nodes that join later.",
    )


class JobConfig(BaseModel):
    """A tagging job, source to Parquet. Every key is checked; an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: tuple[str, ...] = Field(
        description="A folder or s3:// prefix, a file, or several: tars, Parquet, images, or a .txt/.csv list of URIs."
    )
    output: str = Field(description="A folder or s3:// prefix. A run continues what it finds there.")
    labels: LabelSet = Field(
        description="Names, or {names, templates, threshold, top_k}, or the path of a file with them."
    )
    model: ModelConfig = Field(ModelConfig(), description="The checkpoint and how to run it.")
    actors: ActorsConfig = Field(ActorsConfig(), description="The pool that runs the model.")
    parquet: ParquetConfig = Field(ParquetConfig(), description="Reading Parquet inputs.")
    limits: Limits = Field(Limits(), description="What one image may cost.")
    s3: S3Config = Field(S3Config(), description="The object store.")
    ray: RayConfig = Field(RayConfig(), description="Where to run.")
    rows_per_shard: int = Field(
        4096, gt=0, description="About this many images make a shard: what is committed, or redone after a kill."
    )
    decode: DecodeMode = Field(
        "auto",
        description="auto lets libjpeg shrink large JPEGs while decoding where that does not show; fast goes further; "
        "exact never does.",
    )
    embedding_dtype: Literal["float32", "float16"] = Field("float32", description="Of the embedding column.")
    thumbnails: int | None = Field(
        None, gt=0, description="Longer side in pixels of a JPEG kept with each row; true is 256, null is none."
    )
    max_reject_fraction: float = Field(
        0.05,
        ge=0,
        le=1,
        description="More rejects than this among a run's images and it exits with 3, everything committed.",
    )
    on_changed: Literal["error", "retag"] = Field(
        "error",
        description="An input that changed since it was planned: error leaves it, does all else and exits with 1; "
        "retag tags it once more, as new rows.",
    )
    on_missing: Literal["wait", "reject"] = Field(
        "wait",
        description="A planned input that is gone: wait leaves its shard to the next run and exits with 1; reject "
        "gives it up, for who deletes inputs on purpose.",
    )

    @field_validator("input", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        value = (value,) if isinstance(value, str) else value
        if not value:
            raise ValueError("no input: give at least one folder, prefix or file")
        return value

    @field_validator("input", mode="after")
    @classmethod
    def _absolute_inputs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(absolute(uri) for uri in value)

    @field_validator("output", mode="after")
    @classmethod
    def _absolute_output(cls, value: str) -> str:
        return absolute(value).rstrip("/")

    @model_validator(mode="before")
    @classmethod
    def _one_endpoint(cls, value: Any) -> Any:
        """A model in the object store is at the store's endpoint, unless it has one of its own."""
        if not isinstance(value, dict) or not all(isinstance(value.get(key), dict) for key in ("s3", "model")):
            return value
        return {**value, "model": {"endpoint": value["s3"].get("endpoint"), **value["model"]}}

    @field_validator("thumbnails", mode="before")
    @classmethod
    def _true_is_a_size(cls, value: Any) -> Any:
        return (DEFAULT_THUMBNAIL if value else None) if isinstance(value, bool) else value

    def spread_readers(self, cores: int) -> tuple[int, int]:
        """Readers where Ray is started here, and decoders for each: as many readers as are asked for, or a decoder for
        each core.

        With two decoders for a reader, in shards of 3,000 rows, the tiny model's job on two cores was 1.16 times as
        fast as with two readers of one: a reader works a fifth as long on an image as its decoder does, and each is one
        process more to take turns on the cores. But from one shard to the next is a quarter of a second, in which
        another reader goes on: in shards of 200 rows two readers were 1.2 times as fast.
        """
        if self.ray.readers is not None:
            return self.ray.readers, 1
        decoders = min(DECODERS, cores) if self.rows_per_shard >= LARGE_SHARD else 1
        return -(-cores // decoders), decoders


def absolute(uri: str) -> str:
    """A local path from the root of the disk: workers have other working directories, and plans outlive ours."""
    if "://" in uri and not uri.startswith("file://"):
        return uri
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> JobConfig:
    """Read a job's YAML and apply overrides, given as dotted key paths.

    Relative label files are looked up beside the YAML file when they are not found from the working directory.
    Raises `ConfigError`, one line, naming the key and, for an unknown key, the nearest known one.
    """
    raw = read_settings(path, "input: s3://bucket/images")
    for dotted, value in (overrides or {}).items():
        override_key(raw, dotted, value, JobConfig)
    labels = raw.get("labels")
    if isinstance(labels, str):
        raw["labels"] = _beside(path, labels)
    elif isinstance(labels, dict) and isinstance(labels.get("names"), str):
        raw["labels"] = {**labels, "names": _beside(path, labels["names"])}
    return check_settings(path, raw, JobConfig)


def _beside(config: Path, file: str) -> str:
    return file if Path(file).is_file() or not (config.parent / file).is_file() else str(config.parent / file)


def ray_address(config: JobConfig) -> str | None:
    """The cluster to join, or None to start Ray here."""
    return config.ray.address or os.environ.get("RAY_ADDRESS") or None
