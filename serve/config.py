"""The configuration of an endpoint: the keys of `sightline serve CONFIG`, and of `args:` in a Ray Serve config file.

`python -m serve.config` prints a Markdown table of all keys.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from serve.admission.auth import AuthConfig
from serve.admission.load import Load
from serve.fetch.fetcher import FetchConfig
from serve.label_sets.files import find_path
from serve.rayserve.connections import ConnectionsConfig
from serve.schemas import MAX_ITEMS
from serve.search.config import SearchConfig
from siglip.checkpoint import PinnedModel, pin_model
from siglip.config import ChosenModel, Limits, ModelConfig, count_cores
from siglip.heads import check_model
from siglip.images.decode import DecodeMode
from siglip.labels import LabelSet
from storage.key_table import make_key_table
from storage.mirror import Mirror
from storage.schemes import is_remote
from storage.settings import check_settings, read_settings
from storage.store import StoreOptions

GPU_ITEMS, CPU_ITEMS = 256, 64
"""The largest batches that `model.batch_size: auto` makes, on a GPU and on a CPU."""


class ProcessCount(BaseModel):
    """The number of processes of one kind, and the resources of each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: int = Field(1, ge=1, description="Smallest number of processes.")
    max: int | None = Field(None, ge=1, description="Largest number of processes, reached under load; null is min.")
    upscale_delay_s: float = Field(10.0, ge=0, description="Seconds of load before a process is added.")
    downscale_delay_s: float = Field(300.0, ge=0, description="Seconds without load before a process is removed.")
    num_cpus: float | None = Field(None, ge=0, description="CPU cores of each process; null is 1.")
    resources: dict[str, float] = Field({}, description="Custom Ray resources of each process.")

    @model_validator(mode="after")
    def _check(self) -> ProcessCount:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max is {self.max}, less than min {self.min}")
        return self

    @property
    def largest(self) -> int:
        """The largest number of processes."""
        return self.max or self.min


class ReplicasConfig(ProcessCount):
    """The model's replicas."""

    num_gpus: float = Field(0, ge=0, description="GPUs of each replica; replicas with a fraction share a GPU.")


class IngressConfig(ProcessCount):
    """The ingress processes, which speak HTTP and decode images."""

    decoders: int | None = Field(
        None, ge=1, description="Decoder processes of each ingress; null is one for each of its cores."
    )

    def decoder_processes(self) -> int:
        """The number of decoder processes of each ingress."""
        return self.decoders or max(1, int(self.num_cpus or count_cores()))


class CorsConfig(BaseModel):
    """Web pages of other origins that may use the API from a browser."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    origins: list[str] = Field(
        [],
        description="Origins such as https://app.example.com whose pages may call the API; '*' is every origin. By "
        "default only the endpoint's own page may.",
    )

    @field_validator("origins")
    @classmethod
    def _check(cls, value: list[str]) -> list[str]:
        for origin in value:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+", origin):
                raise ValueError(
                    f"{origin!r} is not an origin: write scheme, host and port, as https://app.example.com"
                )
        return value


class BatchingConfig(BaseModel):
    """How batches are filled. Their size is `model.batch_size`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    wait_ms: float = Field(
        50.0,
        ge=0,
        le=10_000,
        description="Milliseconds that decoded images wait for images that are still being decoded, while a replica is "
        "free. A longer wait makes fuller batches.",
    )


class EndpointLimits(BaseModel):
    """Limits of one request, and of all requests in flight. Each limit has its own error code."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    body_bytes: int = Field(32 * 2**20, gt=0, description="Largest body of a request, in bytes, unpacked.")
    images: int = Field(64, ge=1, le=MAX_ITEMS, description="Largest number of images in a request.")
    image: Limits = Field(
        Limits(max_bytes=20 * 2**20, max_pixels=25_000_000, max_seconds=10.0),
        description="Limits of one image. 46 bytes of WebP can hold millions of pixels.",
    )
    pixels: int = Field(
        200_000_000, ge=1, description="Largest sum of the pixels of a request's images, before they are resized."
    )
    texts: int = Field(2048, ge=1, le=MAX_ITEMS, description="Largest number of texts in a request to embed.")
    labels: int = Field(
        1000, ge=1, le=MAX_ITEMS, description="Largest number of prompts in a request: labels times templates."
    )
    label_characters: int = Field(256, ge=1, description="Longest label or template in a request, in characters.")
    pairs: int = Field(
        2**18,
        ge=1,
        description="Largest number of pairs in a response: labels or matches, each with its score. 64 images and "
        "2,048 texts have this many matches in both directions.",
    )
    response_bytes: int = Field(64 * 2**20, gt=0, description="Largest body of a response, in bytes.")
    label_cache_bytes: int = Field(
        128 * 2**20,
        ge=0,
        description="Memory of each ingress for label sets that are not registered and the embeddings of their "
        "prompts, in bytes. A key that fills it drops its own labels first.",
    )
    requests: int = Field(
        1000,
        ge=2,
        description="Largest number of requests that an ingress holds at once, also those that wait; more is refused "
        "with 429. One key may hold half.",
    )
    in_flight: int = Field(
        4096,
        ge=1,
        description="Largest number of images, texts, and thousands of pairs, added up, that an ingress works on at "
        "once. One key may have half of them. More wait for their turn, and are refused with 429 if it would come "
        "after their deadline.",
    )
    in_flight_bytes: int = Field(
        512 * 2**20,
        gt=0,
        description="Largest sum of the bodies and responses that an ingress holds at once, in bytes; more is refused "
        "with 429. One key may hold half.",
    )
    deadline_s: float = Field(
        30.0,
        gt=0,
        description="Deadline of a request, in seconds. A client can shorten it with X-Request-Timeout-Seconds.",
    )

    @model_validator(mode="after")
    def _check(self) -> EndpointLimits:
        if self.in_flight < self._largest():
            raise ValueError(f"in_flight is {self.in_flight}, and one request may hold {self._largest()}")
        if self.in_flight_bytes < self.body_bytes + self.response_bytes:
            raise ValueError("in_flight_bytes is less than body_bytes plus response_bytes: one request would not fit")
        if self.pixels < self.image.max_pixels:
            raise ValueError("pixels is less than image.max_pixels: one image would not fit")
        return self

    def key_items(self) -> int:
        """The share of `in_flight` that one key may hold: half, but at least the largest request."""
        return max(self.in_flight // 2, self._largest())

    def key_requests(self) -> int:
        """The share of `requests` that one key may hold: half."""
        return self.requests // 2

    def key_bytes(self) -> int:
        """The share of `in_flight_bytes` that one key may hold: half, but at least the largest request."""
        return max(self.in_flight_bytes // 2, self.body_bytes + self.response_bytes)

    def _largest(self) -> int:
        """The number of items of the largest request."""
        return Load(images=self.images, texts=max(self.texts, self.labels), pairs=self.pairs).items


class EndpointConfig(BaseModel):
    """All keys of an endpoint's YAML file. Values are validated, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = Field(
        None,
        min_length=1,
        description="The model's id for clients; null is model.source, or the last part of it if it is a path.",
    )
    model: ChosenModel = Field(ModelConfig(), description="The checkpoint and how to run it.")
    label_sets: dict[str, LabelSet] = Field(
        {},
        description="Registered label sets by name. Each is a mapping, a list of label names, or the path of a file, "
        "which is read again when it changes.",
    )
    decode: DecodeMode = Field(
        "auto",
        description="How JPEGs are decoded. auto lets libjpeg shrink large JPEGs while decoding where the result is "
        "almost the same; fast shrinks more; exact never shrinks.",
    )
    replicas: ReplicasConfig = Field(ReplicasConfig(), description="The model's replicas.")
    ingress: IngressConfig = Field(IngressConfig(), description="The processes that speak HTTP and decode images.")
    batching: BatchingConfig = Field(BatchingConfig(), description="How batches are filled.")
    limits: EndpointLimits = Field(EndpointLimits(), description="Limits of a request, and of all requests in flight.")
    auth: AuthConfig = Field(AuthConfig(), description="API keys and rate limits.")
    token_vocabulary: Path | None = Field(
        None,
        description="Path of tiktoken's file cl100k_base.tiktoken. With it the endpoint accepts the token ids that "
        "LangChain sends instead of texts.",
    )
    connections: ConnectionsConfig = Field(
        ConnectionsConfig(), description="Connections of clients, with HAProxy in front of the ingresses."
    )
    cors: CorsConfig = Field(CorsConfig(), description="Web pages that may use the API from a browser.")
    fetch: FetchConfig = Field(FetchConfig(), description="Fetching images by URL. Off by default.")
    search: SearchConfig | None = Field(
        None, description="The output that POST /v1/search searches; null is none. Then the route answers 404."
    )
    metrics_route: bool = Field(
        False,
        description="Serve Prometheus metrics at GET /metrics on the API's own port too. Clients need a key as for the "
        "API.",
    )

    _label_sources: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _remember(cls, value: Any, read: Callable[[Any], EndpointConfig]) -> EndpointConfig:
        """Keep the paths of label sets that come from files, so that the files can be read again."""
        config = read(value)
        sets = value.get("label_sets") if isinstance(value, dict) else None
        if isinstance(sets, dict):
            config._label_sources = {name: source for name, source in sets.items() if find_path(source)}
        return config

    @property
    def label_sources(self) -> dict[str, Any]:
        """The registered label sets that come from files, by name: a path, or a mapping whose `names` is a path."""
        return self._label_sources

    @field_validator("label_sets", mode="after")
    @classmethod
    def _named(cls, value: dict[str, LabelSet]) -> dict[str, LabelSet]:
        if "" in value:
            raise ValueError("a label set has an empty name")
        return value

    def model_name(self) -> str:
        """The model's id in GET /v1/models."""
        if self.name:
            return self.name
        source = self.model.source
        is_path = is_remote(source) or source.startswith(("/", ".", "~"))
        return source.rstrip("/").rsplit("/", 1)[-1] if is_path else source

    def model_digest(self) -> str:
        """A digest of the model's settings: an ingress recognizes replicas with its own configuration by it."""
        return hashlib.sha256(self.model.model_dump_json().encode()).hexdigest()

    def replica_items(self) -> int:
        """Images and texts that Ray Serve may hand to a replica at once: a batch that runs and a batch that fills."""
        size = self.model.batch_size
        return 2 * ((GPU_ITEMS if self.replicas.num_gpus else CPU_ITEMS) if size == "auto" else size)


def load_endpoint(path: Path) -> EndpointConfig:
    """Read an endpoint's YAML file. Relative paths in it are looked up in the working directory, then beside the file.

    Raises `storage.settings.ConfigError`.
    """
    raw = read_settings(path, "model: {source: tiny}", EndpointConfig)
    sets = raw.get("label_sets")
    if isinstance(sets, dict):
        raw["label_sets"] = {name: _beside(path, value) for name, value in sets.items()}
    auth = raw.get("auth")
    if isinstance(auth, dict) and "keys_file" in auth:
        raw["auth"] = {**auth, "keys_file": _beside(path, auth["keys_file"])}
    search = raw.get("search")
    if isinstance(search, dict) and isinstance(search.get("output"), str):
        raw["search"] = {**search, "output": _find_output(path, search["output"])}
    if "token_vocabulary" in raw:
        raw["token_vocabulary"] = _beside(path, raw["token_vocabulary"])
    return check_settings(path, raw, EndpointConfig)


def _beside(path: Path, value: Any) -> Any:
    """The absolute path of a file that exists only beside the settings file; any other value unchanged."""
    if isinstance(value, dict) and isinstance(value.get("names"), str):
        return {**value, "names": _beside(path, value["names"])}
    if isinstance(value, str) and not os.path.exists(value) and os.path.isfile(path.parent / value):
        return str((path.parent / value).resolve())
    return value


def _find_output(path: Path, output: str) -> str:
    """The absolute path of a local output, which Ray's processes find too; below the settings file if it is there."""
    if is_remote(output) or not output:
        return output
    beside = path.parent / output
    return str((beside if not os.path.exists(output) and beside.is_dir() else Path(output)).resolve())


def pin_endpoint_model(config: EndpointConfig) -> PinnedModel:
    """Pin the configured checkpoint, without loading its weights, and check the registered label sets against it.

    Raises `siglip.checkpoints.files.CheckpointError` and `siglip.labels.LabelError`.
    """
    pinned = pin_model(config.model, Mirror(StoreOptions.from_environment(config.model.endpoint)))
    for labels in config.label_sets.values():
        labels.check(pinned.rule)
        check_model(labels, pinned.identity, pinned.width)
    return pinned


def describe_keys() -> str:
    """A Markdown table of all keys with their defaults and meanings, for `docs/endpoint.md`."""
    return make_key_table(EndpointConfig, EndpointConfig())


if __name__ == "__main__":
    print(describe_keys())
