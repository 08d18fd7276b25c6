"""An endpoint's configuration: the keys of `sightline serve CONFIG`, and of `args:` in a Ray Serve config file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from serve.admission.auth import AuthConfig
from serve.fetch.fetcher import FetchConfig
from serve.label_sets.files import find_path
from serve.schemas import MAX_ITEMS
from siglip.checkpoint import PinnedModel, pin_model
from siglip.config import Limits, ModelConfig, count_cores
from siglip.heads import check_probes
from siglip.images.decode import DecodeMode
from siglip.labels import LabelSet
from storage.mirror import Mirror
from storage.schemes import is_remote
from storage.settings import check_settings, read_settings
from storage.store import StoreOptions

GPU_ITEMS, CPU_ITEMS = 256, 64
"""The largest batch that model.batch_size: auto makes on a GPU, and on a CPU."""


class ProcessCount(BaseModel):
    """How many processes, and what each is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: int = Field(1, ge=1, description="Never fewer than this.")
    max: int | None = Field(None, ge=1, description="Up to this many under load; null is min.")
    upscale_delay_s: float = Field(10.0, ge=0, description="Seconds of load before there are more.")
    downscale_delay_s: float = Field(300.0, ge=0, description="Seconds without it before there are fewer.")
    num_cpus: float | None = Field(None, ge=0, description="Cores for each; null is 1.")
    resources: dict[str, float] = Field({}, description="Custom Ray resources for each.")

    @model_validator(mode="after")
    def _check(self) -> ProcessCount:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max is {self.max}, less than min {self.min}")
        return self

    @property
    def largest(self) -> int:
        """The most that there may be."""
        return self.max or self.min


class ReplicasConfig(ProcessCount):
    """The model's replicas."""

    num_gpus: float = Field(0, ge=0, description="GPUs for each replica; a fraction shares one.")


class IngressConfig(ProcessCount):
    """The processes that speak HTTP and decode images."""

    decoders: int | None = Field(None, ge=1, description="Decoder processes of each; null is one for each core.")

    def decoder_processes(self) -> int:
        """Decoder processes of each ingress."""
        return self.decoders or max(1, int(self.num_cpus or count_cores()))


class CorsConfig(BaseModel):
    """Which web pages of other origins may ask, from a browser."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    origins: list[str] = Field(
        [], description="Such as https://app.example.com; '*' is every page. None by default: the endpoint's own page."
    )


class BatchingConfig(BaseModel):
    """How batches fill. Their size is model.batch_size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    wait_ms: float = Field(
        50.0,
        ge=0,
        le=10_000,
        description="How long images wait, while a replica is free, for those that are being decoded.",
    )


class EndpointLimits(BaseModel):
    """What a request may cost, and how much may wait. Each has its own error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    body_bytes: int = Field(32 * 2**20, gt=0, description="Bytes of a request's body.")
    images: int = Field(64, ge=1, le=MAX_ITEMS, description="Images in a request.")
    image: Limits = Field(
        Limits(max_bytes=20 * 2**20, max_pixels=25_000_000, max_seconds=10.0),
        description="What one image may cost. 46 bytes of WebP can hold millions of pixels.",
    )
    pixels: int = Field(
        200_000_000, ge=1, description="Pixels of all images in a request together, before they are resized."
    )
    texts: int = Field(2048, ge=1, le=MAX_ITEMS, description="Texts in a request to embed.")
    text_characters: int = Field(4096, ge=1, description="Characters of a text to embed.")
    labels: int = Field(
        1000, ge=1, le=MAX_ITEMS, description="Labels in a request, and prompts: labels times templates."
    )
    label_characters: int = Field(256, ge=1, description="Characters of a label or a template.")
    cached_prompts: int = Field(
        20_000,
        ge=1,
        description="Prompts of unregistered labels whose embeddings an ingress keeps, last used last out.",
    )
    in_flight: int = Field(
        4096,
        ge=1,
        description="Requests, images and texts that an ingress holds at once; more is refused with 429. One key may "
        "have half of them.",
    )
    in_flight_bytes: int = Field(
        512 * 2**20,
        gt=0,
        description="Bytes of bodies that an ingress holds at once; more is refused with 429. One key may have half.",
    )
    deadline_s: float = Field(
        30.0, gt=0, description="Seconds for a request; X-Request-Timeout-Seconds asks for fewer."
    )

    @model_validator(mode="after")
    def _check(self) -> EndpointLimits:
        if self.in_flight < self._largest():
            raise ValueError(f"in_flight is {self.in_flight}, and one request may hold {self._largest()}")
        if self.in_flight_bytes < self.body_bytes:
            raise ValueError("in_flight_bytes is less than body_bytes: one body would not fit")
        if self.pixels < self.image.max_pixels:
            raise ValueError("pixels is less than image.max_pixels: one image would not fit")
        return self

    def key_items(self) -> int:
        """How much of `in_flight` one key may hold: half, and no less than the largest request."""
        return max(self.in_flight // 2, self._largest())

    def key_bytes(self) -> int:
        """How much of `in_flight_bytes` one key may hold: half, and no less than the largest body."""
        return max(self.in_flight_bytes // 2, self.body_bytes)

    def _largest(self) -> int:
        """Items of the largest request."""
        return 1 + self.images + max(self.texts, self.labels)


class EndpointConfig(BaseModel):
    """The endpoint. Every key is checked; an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = Field(
        None, min_length=1, description="The model's id for clients; null is model.source, or its last part if a path."
    )
    model: ModelConfig = Field(ModelConfig(), description="The checkpoint and how to run it.")
    label_sets: dict[str, LabelSet] = Field(
        {},
        description="Registered label sets by name: {names, templates, threshold, top_k}, or the path of a file, which "
        "is read again when it changes.",
    )
    decode: DecodeMode = Field(
        "auto",
        description="auto lets libjpeg shrink large JPEGs while decoding where that does not show; fast goes further; "
        "exact never does.",
    )
    replicas: ReplicasConfig = Field(ReplicasConfig(), description="The model's replicas.")
    ingress: IngressConfig = Field(IngressConfig(), description="The processes that speak HTTP and decode.")
    batching: BatchingConfig = Field(BatchingConfig(), description="How batches fill.")
    limits: EndpointLimits = Field(EndpointLimits(), description="What a request may cost, and how much may wait.")
    auth: AuthConfig = Field(AuthConfig(), description="API keys and rates. Without keys only loopback is answered.")
    token_vocabulary: Path | None = Field(
        None, description="A file of tiktoken's, cl100k_base.tiktoken, to read the token ids that LangChain sends."
    )
    cors: CorsConfig = Field(CorsConfig(), description="Pages of other origins that may ask from a browser.")
    fetch: FetchConfig = Field(FetchConfig(), description="Fetching images by URL. Off by default.")
    metrics_route: bool = Field(
        False, description="Answer GET /metrics on the API's own port too, to whoever may use the API."
    )

    _label_sources: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _remember(cls, value: Any, read: Callable[[Any], EndpointConfig]) -> EndpointConfig:
        """Where label sets come from, to read them again."""
        config = read(value)
        sets = value.get("label_sets") if isinstance(value, dict) else None
        if isinstance(sets, dict):
            config._label_sources = {name: source for name, source in sets.items() if find_path(source)}
        return config

    @property
    def label_sources(self) -> dict[str, Any]:
        """The registered label sets that were read from files: their paths, or mappings with one."""
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
        """What tells these settings of the model from others."""
        return hashlib.sha256(self.model.model_dump_json().encode()).hexdigest()

    def replica_items(self) -> int:
        """Images and texts that Ray Serve hands to a replica at once: a batch that runs, and one that fills."""
        size = self.model.batch_size
        return 2 * ((GPU_ITEMS if self.replicas.num_gpus else CPU_ITEMS) if size == "auto" else size)


def load_endpoint(path: Path) -> EndpointConfig:
    """Read an endpoint's YAML. Relative files that it names are looked up beside it when they are not found from here.

    Raises `storage.settings.ConfigError`.
    """
    raw = read_settings(path, "model: {source: tiny}")
    sets = raw.get("label_sets")
    if isinstance(sets, dict):
        raw["label_sets"] = {name: _beside(path, value) for name, value in sets.items()}
    auth = raw.get("auth")
    if isinstance(auth, dict) and "keys_file" in auth:
        raw["auth"] = {**auth, "keys_file": _beside(path, auth["keys_file"])}
    if "token_vocabulary" in raw:
        raw["token_vocabulary"] = _beside(path, raw["token_vocabulary"])
    return check_settings(path, raw, EndpointConfig)


def _beside(path: Path, value: Any) -> Any:
    """A relative path that exists only beside the settings file, from there."""
    if isinstance(value, str) and not Path(value).exists() and (path.parent / value).is_file():
        return str((path.parent / value).resolve())
    return value


def pin_endpoint_model(config: EndpointConfig) -> PinnedModel:
    """The checkpoint that is configured, from its settings alone, and its registered label sets checked against it.

    Raises `siglip.checkpoint.CheckpointError` and `siglip.labels.LabelError`.
    """
    pinned = pin_model(config.model, Mirror(StoreOptions.from_environment(config.model.endpoint)))
    for labels in config.label_sets.values():
        labels.check(pinned.rule)
        check_probes(labels, pinned.identity, pinned.width)
    return pinned
