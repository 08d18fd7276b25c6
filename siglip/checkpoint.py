"""Checkpoints: finding their files, reading their settings, and pinning their identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from siglip.config import ImageSpec, ModelConfig
from siglip.families import FAMILIES, Family, recognize_family
from siglip.families.text_rules import RULES, choose_family
from storage.store import Unreachable

TINY = Path(__file__).parent / "checkpoints" / "tiny"
"""The checkpoint that ships with Sightline: see its README."""
_SMALL_FLOPS = 1e9
_CONFIG, _TOKENIZER = "config.json", "tokenizer_config.json"
_IMAGES, _PROCESSOR = "preprocessor_config.json", "processor_config.json"
_SETTINGS = (_CONFIG, _IMAGES, _PROCESSOR, _TOKENIZER)
_FAMILY_FILES = {name for family in FAMILIES.values() for name in family.FILES}
_TOKENIZER_EXTRAS = ("special_tokens_map.json", "added_tokens.json")
_FILES = frozenset((*_SETTINGS, *_TOKENIZER_EXTRAS, *_FAMILY_FILES))
"""The files of a checkpoint that are read, besides the weights. Pickles and code are never read."""

_Count = Annotated[int, Field(gt=0, strict=True)]
_Settings = TypeVar("_Settings", bound=BaseModel)


class TowerSettings(BaseModel):
    """Settings that both towers have, with transformers' defaults. Those for training (dropout, initialisation) are
    ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    hidden_size: _Count = 768
    intermediate_size: _Count = 3072
    num_hidden_layers: _Count = 12
    num_attention_heads: _Count = 12
    hidden_act: Literal["gelu_pytorch_tanh", "gelu"] = "gelu_pytorch_tanh"
    layer_norm_eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-6

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.num_attention_heads} heads cannot share a hidden_size of {self.hidden_size}")
        return self


class VisionSettings(TowerSettings):
    """A `vision_config`, as transformers' `SiglipVisionConfig` reads it. Sizes are in pixels."""

    image_size: _Count = 224
    patch_size: _Count = 16
    num_channels: Literal[3] = 3
    vision_use_head: Literal[True] = True


class TextSettings(TowerSettings):
    """A `text_config`. `projection_size` is the width of the text embeddings, if it is not the tower's width."""

    vocab_size: _Count = 32000
    max_position_embeddings: _Count = 64
    projection_size: _Count | None = None


class Architecture(BaseModel):
    """A `config.json`. Missing values are those of `google/siglip-base-patch16-224`, as in transformers."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    vision_config: VisionSettings = VisionSettings()
    text_config: TextSettings = TextSettings()


class _Images(BaseModel):
    """The keys of `preprocessor_config.json` that count, with the defaults of transformers' `SiglipImageProcessor`."""

    model_config = ConfigDict(extra="ignore")

    size: Any = None
    resample: Annotated[int, Field(ge=0, le=5, strict=True)] = 3
    image_mean: Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=3, max_length=3)] = [
        0.5
    ] * 3
    image_std: Annotated[
        list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=3, max_length=3)
    ] = [0.5] * 3
    rescale_factor: float = 1 / 255
    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True


class CheckpointError(Exception):
    """A checkpoint that cannot be used. The message is one line that says what to change."""


class PrefixMirror(Protocol):
    """The interface for downloading a checkpoint from an object store. `storage.mirror.Mirror` implements it."""

    def identify(self, prefix: str, wanted: Callable[[str], bool]) -> str:
        """A string that changes when one of the wanted files changes."""

    def fetch(self, prefix: str, wanted: Callable[[str], bool], now: Callable[[str], bool]) -> tuple[Path, str]:
        """Download the wanted files that are needed `now`. Returns their folder, and the wanted files' identity."""


@dataclass(frozen=True)
class PinnedModel:
    """A checkpoint pinned to one version: loading it on another machine gives the same weights or an error.

    `config` is the user's, with a branch of the hub resolved to its commit. `identity` changes when a file changes: it
    is the SHA-256 of a directory's files, the ETags of files in an object store, or the hub's commit. The same weights
    in two places may therefore have two identities.
    """

    config: ModelConfig
    identity: str
    spec: ImageSpec
    family: str
    architecture: Architecture
    mirror: PrefixMirror | None = None

    @property
    def width(self) -> int:
        """D, the embedding's length: the vision tower's width. `SiglipConfig.projection_dim` is wrong."""
        return self.architecture.vision_config.hidden_size

    @property
    def text_length(self) -> int:
        """Number of tokens of a text that the model reads."""
        return self.architecture.text_config.max_position_embeddings

    @property
    def vision_flops(self) -> float:
        """Floating-point operations to embed one image, to within a few per cent: 44e9 for base at 256 x 256.

        Counts the transformer's matrix products: 8 D^2 for the attention's projections, 4 T D for the attention itself
        and 4 D M for the MLP of width M, for each of T tokens and each layer.
        """
        vision = self.architecture.vision_config
        width = vision.hidden_size
        tokens = (vision.image_size // vision.patch_size) ** 2
        each = 8 * width**2 + 4 * tokens * width + 4 * width * vision.intermediate_size
        return float(vision.num_hidden_layers * tokens * each)

    @property
    def rule(self) -> Family:
        """The family's text rules."""
        return FAMILIES[self.family]

    @property
    def is_small(self) -> bool:
        """Whether embedding an image takes less time than decoding it: under 1e9 floating-point operations.

        One thread on one core then embeds the images of several decoders.
        """
        return self.vision_flops < _SMALL_FLOPS

    def fetch(self, weights: bool = True) -> Path:
        """The directory with the checkpoint's files here, downloaded if necessary; `weights` are optional.

        Raises `CheckpointError` when this machine finds another version: a file that differs between nodes, or a
        prefix that was overwritten.
        """
        now = None if weights else (*_SETTINGS, *self.rule.FILES, *_TOKENIZER_EXTRAS)
        directory, identity = _locate(self.config, self.mirror, now)
        if identity != self.identity:
            raise CheckpointError(
                f"model.source: {self.config.source} is another checkpoint here ({_short(identity)}) than the one "
                f"with which the run started ({_short(self.identity)}): put the same files on all machines, or pin a "
                "revision"
            )
        return directory


def pin_model(config: ModelConfig, mirror: PrefixMirror | None = None) -> PinnedModel:
    """Find a checkpoint, read its settings and pin its version. Does not download weights.

    Raises `CheckpointError` when there is no such checkpoint, or when it is not a SigLIP of a supported family.
    """
    directory, identity = _locate(config, mirror, _SETTINGS)
    source = config.source
    settings = _read_json(directory / _CONFIG, source)
    _check_type(settings, source)
    architecture = _parse(settings, Architecture, _CONFIG, source)
    vision, text = architecture.vision_config, architecture.text_config
    if (text.projection_size or text.hidden_size) != vision.hidden_size:
        raise CheckpointError(
            f"model.source: {source}: {_CONFIG}: text embeddings have {text.projection_size or text.hidden_size} "
            f"numbers (text_config.projection_size), and image embeddings have {vision.hidden_size} "
            "(vision_config.hidden_size)"
        )
    tokenizer = _read_json(directory / _TOKENIZER, source) if (directory / _TOKENIZER).exists() else {}
    # Only the settings of a remote checkpoint are downloaded yet, so all files are assumed to exist.
    here = {path.name for path in directory.iterdir()} if identity.startswith("sha256:") else _FILES
    family = recognize_family(tokenizer, here)
    if family is None:
        known = ", ".join(f"{known.CLASSES[0]} with {' or '.join(known.FILES)}" for known in RULES.values())
        raise CheckpointError(
            f"model.source: {source}: {_TOKENIZER}: tokenizer_class {tokenizer.get('tokenizer_class') or 'missing'}: "
            f"expected that of a known family ({known})"
        )
    if identity.startswith("commit:"):
        config = config.model_copy(update={"revision": identity.removeprefix("commit:")})
    return PinnedModel(
        config,
        identity,
        _read_spec(directory, vision.image_size, source),
        choose_family(family, config.text_rule).NAME,
        architecture,
        mirror,
    )


def _check_type(model: Mapping[str, Any], source: str) -> None:
    kind = model.get("model_type")
    if kind == "siglip2":
        raise CheckpointError(
            f"model.source: {source} is a NaFlex model, for images of any shape, which is not supported: use a "
            "SigLIP 2 checkpoint of fixed resolution, such as google/siglip2-base-patch16-256"
        )
    if kind != "siglip":
        raise CheckpointError(f"model.source: {source} is a model of type {kind or 'unknown'}, not siglip")


def _read_spec(directory: Path, trained: int, source: str) -> ImageSpec:
    """Read the preprocessing from its own file or, as transformers 5 writes it, from the processor's file."""
    name = _IMAGES
    nested = _read_json(directory / _PROCESSOR, source) if (directory / _PROCESSOR).exists() else {}
    if isinstance(nested.get("image_processor"), dict):
        name, given = _PROCESSOR, nested["image_processor"]
    else:
        given = _read_json(directory / _IMAGES, source)
    images = _parse(given, _Images, name, source)
    size = images.size
    height, width = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    if type(height) is not int or height != width or height != trained:
        raise CheckpointError(
            f"model.source: {source}: {name}: size {size!r} is not the {trained} x {trained} pixels of {_CONFIG}"
        )
    for key, wanted in (("do_resize", True), ("do_rescale", True), ("do_normalize", True)):
        if getattr(images, key) is not wanted:
            raise CheckpointError(
                f"model.source: {source}: {name}: {key}: false is not supported, because no SigLIP was trained so"
            )
    if abs(images.rescale_factor * 255 - 1) > 1e-6:
        raise CheckpointError(
            f"model.source: {source}: {name}: rescale_factor: expected 1/255 (given: {images.rescale_factor!r})"
        )
    mean, std = tuple(images.image_mean), tuple(images.image_std)
    return ImageSpec.model_validate({"size": height, "resample": images.resample, "mean": mean, "std": std})


def _parse(values: Mapping[str, Any], kind: type[_Settings], name: str, source: str) -> _Settings:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"model.source: {source}: {name}: {where}: {first['msg']} (given: {str(first['input'])[:60]})"
        ) from None


def quiet_transformers() -> None:
    """Turn off transformers' progress bars and warnings. It warns about the published checkpoints' own config."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _locate(config: ModelConfig, mirror: PrefixMirror | None, now: Collection[str] | None) -> tuple[Path, str]:
    """The directory of a checkpoint's files, and its identity. Only the files `now` are downloaded; None is all."""
    source = config.source
    if "://" in source:
        if mirror is None:
            raise CheckpointError(f"model.source: {source}: a checkpoint in an object store needs a mirror")
        try:
            directory, etags = mirror.fetch(source, _is_wanted, lambda name: now is None or name in now)
        except Exception as error:
            if isinstance(error, Unreachable):  # not for the user to correct
                raise
            raise CheckpointError(f"model.source: {error}") from error
        return directory, f"etags:{etags}"
    path = TINY if source == "tiny" else Path(source).expanduser()
    if path.is_dir():
        return path, f"sha256:{_hash_files(path, _versions(path))}"
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        directory = _fetch_hub(source, config.revision, now)
        return directory, f"commit:{directory.name}"
    raise CheckpointError(f"model.source: {source} is not a directory, an s3:// prefix or a hub id")


def _is_wanted(name: str) -> bool:
    return name in _FILES or name.endswith((".safetensors", ".safetensors.index.json"))


def _versions(directory: Path) -> tuple[tuple[str, int, int], ...]:
    paths = sorted(path for path in directory.iterdir() if _is_wanted(path.name))
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)


@cache
def _hash_files(directory: Path, versions: tuple[tuple[str, int, int], ...]) -> str:
    """SHA-256 of a checkpoint's files. Cached, so each process reads the gigabytes once for each version."""
    digest = hashlib.sha256()
    for name, size, _ in versions:
        digest.update(f"{name} {size}\n".encode())
        with (directory / name).open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def _read_json(path: Path, source: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"model.source: {source} has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model.source: {source}: cannot read {path.name}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"model.source: {source}: {path.name} is not a JSON object")
    return value


def _fetch_hub(source: str, revision: str | None, now: Collection[str] | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_FILES, "*.safetensors", "*.safetensors.index.json"] if now is None else [*now]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises a dozen unrelated types: offline, missing, gated, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"model.source: {source} is not a directory here and could not be fetched from the hub ({reason})"
        ) from error


def _short(identity: str) -> str:
    kind, _, value = identity.partition(":")
    return f"{kind} {value[:12]}"
