"""The configuration of a tagging job: one YAML file, which is checked before any work."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipelines.inputs.web.config import FetchConfig
from pipelines.output.schema import OWN_COLUMNS
from pipelines.planning.dates import default_dates, expand_dates, fixed_part
from pipelines.tables.names import TABLE_NAMES, is_table
from siglip.config import ChosenModel, Limits, ModelConfig
from siglip.images.decode import DecodeMode
from siglip.labels import LabelSet
from storage.hub.names import use_one_spelling
from storage.schemes import lower_scheme, refuse_output, refuse_partial
from storage.settings import ConfigError, check_settings, override_keys, read_settings

DEFAULT_THUMBNAIL = 256
"""The longer side in pixels of a thumbnail if `thumbnails` is true."""


class ActorsConfig(BaseModel):
    """The pool of actors: processes that hold the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: int | None = Field(
        None,
        ge=1,
        description="Minimum size of the actor pool. null is 1; but on one machine without a GPU, if max, initial and "
        "num_cpus are null too, one for each 2 cores (small models: 4 cores), up to 8.",
    )
    max: int | None = Field(None, ge=1, description="Maximum size of the pool, which grows under load; null is min.")
    initial: int | None = Field(None, ge=1, description="Number of actors to start with; null is min.")
    num_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs for each actor; a fraction shares a GPU; null is 1 if the cluster has enough now, else 0.",
    )
    num_cpus: float | None = Field(
        None, gt=0, description="Cores for each actor; null is 1 with a GPU, else as many as the current nodes allow."
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
        """The minimum size of the pool."""
        return self.min or 1

    @property
    def largest(self) -> int:
        """The largest number of actors that the pool may have, as configured."""
        return self.max if self.max is not None else max(self.smallest, self.initial or 1)


class ParquetConfig(BaseModel):
    """How to read Parquet inputs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_column: str | None = Field(
        None,
        description="Column with image bytes, structs {bytes, path}, lists of these, or URIs; a.b is a field of a "
        "struct. null: what Hugging Face's metadata says, else a column named as images are, else the only one with "
        "bytes.",
    )
    key_column: str | None = Field(
        None, description="Column that becomes `key`; null is the struct's path, or the row number."
    )
    columns: dict[str, str] = Field(
        {}, description="Columns to copy to the output: a list of names, or {name: name in the output}."
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
                raise ValueError(f"columns: the name {name!r} in the output is empty, or used for two columns")
        return self


class ListsConfig(BaseModel):
    """How to read lists of images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    column: str | None = Field(
        None, description="Column or key of CSV, TSV and JSON Lines lists that holds the URI; null detects it by name."
    )


class S3Config(BaseModel):
    """The object store. Credentials come from the environment, a profile or a role, never from this file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: str | None = Field(None, description="Endpoint URL; null is AWS_ENDPOINT_URL, or AWS itself.")
    region: str | None = Field(None, description="Region; null is AWS_REGION or the profile's.")


class CostConfig(BaseModel):
    """What the machines cost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    per_hour: float | None = Field(
        None, ge=0, description="Price of an hour of the machines that a run uses, for `status` and `plan`."
    )


class RayConfig(BaseModel):
    """The Ray cluster to run on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str | None = Field(
        None,
        description="Address of an existing cluster; null is RAY_ADDRESS, or a new Ray on this machine for this run.",
    )
    readers: int | None = Field(
        None,
        ge=1,
        description="Shards read at once. null on a cluster: as many as it has room for, also on nodes that join "
        "later. null on one machine: one for each core, or for each 2 cores if rows_per_shard is 2048 or more.",
    )

    def find_address(self) -> str | None:
        """Return the address of the cluster to join, or None to start Ray on this machine."""
        return self.address or os.environ.get("RAY_ADDRESS") or None


class JobConfig(BaseModel):
    """A tagging job, from images to Parquet files. Every key is checked; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: tuple[str, ...] = Field(
        description="A folder, s3://, gs:// or az:// prefix or file, a dataset of the hub (hf://datasets/OWNER/NAME), "
        "or several: tars, Parquet, images, lists of URIs (.txt, .csv, .tsv, .jsonl), or the manifest.json of an S3 "
        "Inventory. {date} stands for a day, {date:%Y/%m/%d} for another way to write it."
    )
    dates: tuple[date, ...] | None = Field(
        None,
        description="The day or days that {date} in input stands for; null is today and yesterday, in UTC.",
    )
    output: str = Field(
        description="A folder or s3://, gs:// or az:// prefix. A run continues the work of earlier runs there."
    )
    labels: LabelSet = Field(
        description="A list of names, or {names, templates, threshold, top_k}, or the path of a file with either."
    )
    model: ChosenModel = Field(ModelConfig(), description="The checkpoint and how to run it.")
    actors: ActorsConfig = Field(ActorsConfig(), description="The pool of actors that run the model.")
    parquet: ParquetConfig = Field(ParquetConfig(), description="How to read Parquet inputs.")
    lists: ListsConfig = Field(ListsConfig(), description="How to read lists of images.")
    fetch: FetchConfig = Field(
        FetchConfig(), description="Fetching the http(s) URLs of lists. Off by default: see docs/inputs.md."
    )
    limits: Limits = Field(Limits(), description="Limits for one image; larger images are rejected.")
    s3: S3Config = Field(S3Config(), description="The object store.")
    ray: RayConfig = Field(RayConfig(), description="The Ray cluster to run on.")
    cost: CostConfig = Field(CostConfig(), description="What the machines cost.")
    rows_per_shard: int = Field(
        4096,
        gt=0,
        description="Images in a shard, roughly. A shard is committed as a whole, or done again after a kill.",
    )
    decode: DecodeMode = Field(
        "auto",
        description="How to decode large JPEGs. auto: libjpeg scales them down while decoding if the result looks the "
        "same; fast: scales down further; exact: never scales while decoding.",
    )
    embedding_dtype: Literal["float32", "float16"] = Field(
        "float32", description="Type of the values in the embedding column."
    )
    thumbnails: int | None = Field(
        None,
        gt=0,
        le=4096,
        description="Longer side in pixels of the JPEG thumbnail in each row; true is 256, null is no thumbnail.",
    )
    max_reject_fraction: float = Field(
        0.05,
        ge=0,
        le=1,
        description="If a larger part of its images is rejected, a run exits with 3. All images are committed anyway.",
    )
    index: bool = Field(
        False,
        description="After a run that committed something, bring the output's index up to it, as `sightline index` "
        "does. If that fails, the run exits with 1, and what it committed stays.",
    )
    table: str | None = Field(
        None,
        description="delta: keep a Delta table over the output's files, for Spark, Trino, DuckDB and others; "
        "iceberg:CATALOG/NAMESPACE.TABLE: an Iceberg table. A run brings it up to the output at its end. If that "
        "fails, it exits with 1, and what it committed stays.",
    )
    on_changed: Literal["error", "retag"] = Field(
        "error",
        description="What to do with an input that changed since it was planned. error: skip it, do everything else "
        "and exit with 1; retag: tag it again, as new rows. On a disk another modification time is a change.",
    )
    on_missing: Literal["wait", "reject"] = Field(
        "wait",
        description="What to do with a planned input that is missing. wait: leave its shard to the next run and exit "
        "with 1; reject: reject its images. Set reject if you delete inputs on purpose.",
    )

    @field_validator("input", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        value = (value,) if isinstance(value, str) else value
        if not value:
            raise ValueError("no input: give at least one folder, prefix or file")
        return value

    @field_validator("dates", mode="before")
    @classmethod
    def _one_day_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (str, date)) else value

    @field_validator("input", mode="after")
    @classmethod
    def _absolute_inputs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_absolute_value(uri) for uri in value)

    @field_validator("output", mode="after")
    @classmethod
    def _absolute_output(cls, value: str) -> str:
        return _absolute_value(value, refuse_output).rstrip("/")

    @model_validator(mode="before")
    @classmethod
    def _one_endpoint(cls, value: Any) -> Any:
        """Use the endpoint of `s3` for a model in the object store, unless `model.endpoint` is set."""
        if not isinstance(value, dict) or not all(isinstance(value.get(key), dict) for key in ("s3", "model")):
            return value
        return {**value, "model": {"endpoint": value["s3"].get("endpoint"), **value["model"]}}

    @model_validator(mode="after")
    def _check_dates(self) -> JobConfig:
        try:
            dated = expand_dates(self.input, [date.min]) != list(dict.fromkeys(self.input))
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if self.dates is not None and not dated:
            raise ValueError("dates: no input has {date}: leave the dates out, or write {date} in input")
        if self.dates is not None and not self.dates:
            raise ValueError("dates: give at least one day, or null")
        return self

    def list_inputs(self) -> list[str]:
        """Return the inputs, with the days of `dates` in the place of `{date}`."""
        return expand_dates(self.input, self.dates or default_dates(datetime.now(UTC)))

    def list_roots(self) -> list[str]:
        """Return the folders and files that hold the inputs of all days: of an input with `{date}`, the part before."""
        return [fixed_part(one) or one for one in self.input]

    @field_validator("table")
    @classmethod
    def _known_table(cls, value: str | None) -> str | None:
        if value is not None and not is_table(value):
            raise ValueError(f"table: {value!r} is none: write {TABLE_NAMES}")
        return value

    @field_validator("thumbnails", mode="before")
    @classmethod
    def _true_is_a_size(cls, value: Any) -> Any:
        return (DEFAULT_THUMBNAIL if value else None) if isinstance(value, bool) else value


def absolute(uri: str) -> str:
    """Return a local path as an absolute path, and any other URI unchanged but for the spelling of a hub's revision.

    Workers have other working directories, and a plan is read by later runs from other working directories. Links stay
    as they are, except those before a `..`. Raises `ConfigError` for an empty path or a part of a URI.
    """
    refuse_partial(uri := lower_scheme(uri))
    if "://" in uri and not uri.startswith("file://"):
        return use_one_spelling(uri)
    path = uri.removeprefix("file://")
    if not path.strip():  # an unset variable in a template; it must not become the working directory
        raise ConfigError(f"the path {uri!r} is empty: write . for the working directory")
    above, dots, name = (os.path.join(os.getcwd(), os.path.expanduser(path)).rstrip("/") + "/").rpartition("/../")
    # `..` after a link is the folder above the link's target, so the part up to the last `..` is resolved.
    return os.path.abspath(os.path.join(os.path.realpath(f"{above}/.."), name) if dots else name)


def _absolute_value(uri: str, check: Callable[[str], None] = lambda uri: None) -> str:
    """Return `absolute(uri)` for a validator of pydantic, which reports a `ValueError` with its key."""
    try:
        check(found := absolute(uri))
        return found
    except ConfigError as error:
        raise ValueError(str(error)) from None


def load_config(path: Path | str, overrides: dict[str, Any] | None = None) -> JobConfig:
    """Read a job's YAML file and apply `overrides`, given by dotted key such as `model.source`.

    The relative path of a label file is relative to the working directory, or else to the folder of the YAML file.
    Raises `ConfigError` with one line that names the key and, for an unknown key, the most similar known one.
    """
    path = Path(path)
    raw = read_settings(path, "input: s3://bucket/images", JobConfig)
    _find_label_files(path, raw)  # before the overrides, which change the content of a file
    override_keys(raw, overrides or {}, JobConfig)
    _find_label_files(path, raw)
    return check_settings(path, raw, JobConfig)


def _find_label_files(path: Path, raw: dict[str, Any]) -> None:
    labels = raw.get("labels")
    if isinstance(labels, str):
        raw["labels"] = _find_label_file(path, labels)
    elif isinstance(labels, dict) and isinstance(labels.get("names"), str):
        raw["labels"] = {**labels, "names": _find_label_file(path, labels["names"])}


def _find_label_file(config: Path, file: str) -> str:
    beside = config.parent / file
    return file if os.path.isfile(file) or not os.path.isfile(beside) else str(beside)
