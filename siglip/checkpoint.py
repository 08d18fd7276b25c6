"""A checkpoint: where its files are, what its settings say, and which one it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from siglip.config import ImageSpec, ModelConfig
from siglip.families import FAMILIES, Family, recognize_family

TINY = Path(__file__).parent / "checkpoints" / "tiny"
"""The checkpoint that ships with Sightline: see its README."""

_CONFIG, _IMAGES, _TOKENIZER = "config.json", "preprocessor_config.json", "tokenizer_config.json"
_SETTINGS = (_CONFIG, _IMAGES, _TOKENIZER)
_FILES = frozenset(
    (*_SETTINGS, "special_tokens_map.json", *(name for family in FAMILIES.values() for name in family.FILES))
)
"""What is read of a checkpoint, weights aside. Never a pickle, never code."""


class CheckpointError(Exception):
    """A checkpoint that cannot be used. The message is one line that says what to change."""


class PrefixMirror(Protocol):
    """What fetches an `s3://` prefix: this package knows no object store. `storage.mirror.Mirror` is one."""

    def identify(self, prefix: str, wanted: Callable[[str], bool]) -> str:
        """A string that changes when one of the wanted files does."""

    def fetch(self, prefix: str, wanted: Callable[[str], bool], now: Callable[[str], bool]) -> tuple[Path, str]:
        """A folder that is to hold the wanted files, with those needed `now`; and its identity."""


@dataclass(frozen=True)
class PinnedModel:
    """One checkpoint, as its settings describe it, pinned: whoever loads it elsewhere gets these weights or an error.

    `config` is the user's, with a hub's branch resolved to its commit. `identity` changes when a file does: the SHA-256
    of a directory's files, the ETags of a mirror's, or the hub's commit. The same weights in two places may therefore
    be told apart. `width` is D, the embedding's length: that of the vision tower, 768 for the base models
    (`SiglipConfig.projection_dim` says 512 for them and is wrong). `text_length` is in tokens.
    """

    config: ModelConfig
    identity: str
    spec: ImageSpec
    family: str
    width: int
    text_length: int
    vision_flops: float
    mirror: PrefixMirror | None = None

    @property
    def rule(self) -> Family:
        """The family's text rules."""
        return FAMILIES[self.family]

    def fetch(self) -> Path:
        """All of its files, on this machine.

        Raises `CheckpointError` when what is found here is another checkpoint: a file that differs on another node, a
        mirror that was overwritten.
        """
        directory, identity = _locate(self.config, self.mirror, everything=True)
        if identity != self.identity:
            raise CheckpointError(
                f"model.source: {self.config.source} is another checkpoint here ({_short(identity)}) than the one that "
                f"was started with ({_short(self.identity)}): bring all machines to the same files, or pin a revision"
            )
        return directory


def pin_model(config: ModelConfig, mirror: PrefixMirror | None = None) -> PinnedModel:
    """Find a checkpoint, read its settings and pin it. Remote weights are not downloaded for it.

    Raises `CheckpointError` when it cannot be found, or is no SigLIP of a supported family.
    """
    directory, identity = _locate(config, mirror, everything=False)
    source = config.source
    model, images = (_read_json(directory / name, source) for name in (_CONFIG, _IMAGES))
    tokenizer = _read_json(directory / _TOKENIZER, source) if (directory / _TOKENIZER).exists() else {}
    _check_type(model, source)
    # Of a remote checkpoint only the settings are here yet.
    here = {path.name for path in directory.iterdir()} if identity.startswith("sha256:") else _FILES
    family = recognize_family(tokenizer, here)
    if family is None:
        raise CheckpointError(
            f"model.source: {source} has a tokenizer of no known family "
            f"({tokenizer.get('tokenizer_class') or 'unnamed'}): expected SigLIP's or SigLIP 2's"
        )
    vision, text = model.get("vision_config") or {}, model.get("text_config") or {}
    spec = _read_spec(images, int(vision.get("image_size", 224)), source)
    if identity.startswith("commit:"):
        config = config.model_copy(update={"revision": identity.removeprefix("commit:")})
    return PinnedModel(
        config,
        identity,
        spec,
        family.NAME,
        int(vision.get("hidden_size", 768)),
        int(text.get("max_position_embeddings", 64)),
        _count_flops(vision),
        mirror,
    )


def _check_type(model: Mapping[str, Any], source: str) -> None:
    kind = model.get("model_type")
    if kind == "siglip2":
        raise CheckpointError(
            f"model.source: {source} is a NaFlex model, which takes images of any shape: use a SigLIP 2 checkpoint of "
            "fixed resolution, such as google/siglip2-base-patch16-256"
        )
    if kind != "siglip":
        raise CheckpointError(f"model.source: {source} is a {kind or 'nameless'} model, not a siglip")


def _read_spec(images: Mapping[str, Any], trained: int, source: str) -> ImageSpec:
    size = images.get("size")
    height, width = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    if not height or height != width or height != trained:
        raise CheckpointError(
            f"model.source: {source} resizes to {height}x{width} and its model takes {trained}x{trained}"
        )
    try:
        return ImageSpec(
            size=height,
            resample=images.get("resample", 3),
            mean=images.get("image_mean", (0.5, 0.5, 0.5)),
            std=images.get("image_std", (0.5, 0.5, 0.5)),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"model.source: {source}: {_IMAGES}: {first['loc'][0]}: {first['msg']} (given: {first['input']!r})"
        ) from None


def _count_flops(vision: Mapping[str, Any]) -> float:
    """Floating-point operations to embed one image, to within a few per cent: 44e9 for base at 256 x 256.

    Counts the transformer's matrix products: 24 D^2 + 4 T D for each of T tokens and each layer, with the usual
    4 D wide MLP.
    """
    width, layers = vision.get("hidden_size", 768), vision.get("num_hidden_layers", 12)
    tokens = (vision.get("image_size", 224) // vision.get("patch_size", 16)) ** 2
    return float(layers * tokens * (24 * width**2 + 4 * tokens * width))


def quiet_transformers() -> None:
    """No progress bars, and no warnings: it warns about the real checkpoint's own config."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _locate(config: ModelConfig, mirror: PrefixMirror | None, *, everything: bool) -> tuple[Path, str]:
    """The directory of a checkpoint's files, of remote ones at least the settings; and its identity."""
    source = config.source
    if "://" in source:
        if mirror is None:
            raise CheckpointError(f"model.source: {source}: no object store is at hand here")
        try:
            directory, etags = mirror.fetch(source, _is_wanted, lambda name: everything or name in _SETTINGS)
        except Exception as error:  # the mirror's own errors, which this package does not know
            raise CheckpointError(f"model.source: {error}") from error
        return directory, f"etags:{etags}"
    path = TINY if source == "tiny" else Path(source).expanduser()
    if path.is_dir():
        return path, f"sha256:{_hash_files(path, _versions(path))}"
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        directory = _fetch_hub(source, config.revision, everything)
        return directory, f"commit:{directory.name}"
    raise CheckpointError(f"model.source: {source} is no directory, no s3:// prefix and no hub id")


def _is_wanted(name: str) -> bool:
    return name in _FILES or name.endswith((".safetensors", ".safetensors.index.json"))


def _versions(directory: Path) -> tuple[tuple[str, int, int], ...]:
    paths = sorted(path for path in directory.iterdir() if _is_wanted(path.name))
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)


@cache
def _hash_files(directory: Path, versions: tuple[tuple[str, int, int], ...]) -> str:
    """Gigabytes are read once in each process, and again when a file is another."""
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
        raise CheckpointError(f"model.source: {source}: {path.name} is no JSON object")
    return value


def _fetch_hub(source: str, revision: str | None, everything: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_FILES, "*.safetensors", "*.safetensors.index.json"] if everything else [*_SETTINGS]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises a dozen unrelated types: offline, missing, gated, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"model.source: {source} is no directory here and could not be fetched from the hub ({reason})"
        ) from error


def _short(identity: str) -> str:
    kind, _, value = identity.partition(":")
    return f"{kind} {value[:12]}"
