"""Where a checkpoint's files come from: a directory, an s3:// mirror, or the hub."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from siglip.config import ImageSpec, ModelConfig

TINY = Path(__file__).parent / "checkpoints" / "tiny"
"""The checkpoint that ships with Sightline: see its README."""

SETTINGS = ("config.json", "preprocessor_config.json")
FILES = (*SETTINGS, "model.safetensors", "spiece.model", "tokenizer_config.json", "special_tokens_map.json")
"""What is read of a checkpoint, sharded weights aside. Never a pickle, never code."""


class CheckpointError(Exception):
    """A checkpoint that cannot be used. The message is one line that says what to change."""


@cache
def fetch_checkpoint(config: ModelConfig, *, settings_only: bool = False) -> Path:
    """The directory that holds the checkpoint's files, downloaded first where they are remote.

    With `settings_only` a remote checkpoint's weights are not fetched. Remote files are cached on this machine by
    their revision or ETag, in the hub's own cache or under `SIGHTLINE_CACHE` (default ~/.cache/sightline).

    Raises `CheckpointError`.
    """
    source = config.source
    if source == "tiny":
        return TINY
    if source.startswith("s3://"):
        return _fetch_s3(source, config.endpoint, settings_only)
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return _fetch_hub(source, config.revision, settings_only)
    raise CheckpointError(f"model.source: {source} is no directory, no s3:// prefix and no hub id")


def read_image_spec(config: ModelConfig) -> ImageSpec:
    """The checkpoint's preprocessing, and the check that it is a SigLIP: without reading its weights.

    Raises `CheckpointError`.
    """
    directory = fetch_checkpoint(config, settings_only=True)
    model, images = (_read_json(directory / name, config.source) for name in SETTINGS)
    if model.get("model_type") != "siglip":
        raise CheckpointError(
            f"model.source: {config.source} is a {model.get('model_type', 'nameless')} model, not a siglip"
        )
    size = images.get("size", {})
    height, width = size.get("height"), size.get("width")
    trained = model.get("vision_config", {}).get("image_size", 224)
    if not height or height != width or height != trained:
        raise CheckpointError(
            f"model.source: {config.source} resizes to {height}x{width} and its model takes {trained}x{trained}"
        )
    return ImageSpec(
        size=height,
        resample=images.get("resample", 3),
        mean=tuple(images.get("image_mean") or (0.5, 0.5, 0.5)),
        std=tuple(images.get("image_std") or (0.5, 0.5, 0.5)),
    )


def embedding_width(config: ModelConfig) -> int:
    """D, the embedding's length: the vision tower's width, 768 for the base models.

    `SiglipConfig.projection_dim` says 512 for the same checkpoints and is wrong. Raises `CheckpointError`.
    """
    directory = fetch_checkpoint(config, settings_only=True)
    return int(_read_json(directory / "config.json", config.source).get("vision_config", {}).get("hidden_size", 768))


def vision_flops(config: ModelConfig) -> float:
    """Floating-point operations to embed one image, to within a few per cent: 44e9 for base at 256 x 256.

    Counts the transformer's matrix products: 24 D^2 + 4 T D for each of T tokens and each layer, with the usual
    4 D wide MLP. Raises `CheckpointError`.
    """
    directory = fetch_checkpoint(config, settings_only=True)
    vision = _read_json(directory / "config.json", config.source).get("vision_config", {})
    width, layers = vision.get("hidden_size", 768), vision.get("num_hidden_layers", 12)
    tokens = (vision.get("image_size", 224) // vision.get("patch_size", 16)) ** 2
    return float(layers * tokens * (24 * width**2 + 4 * tokens * width))


def identify_checkpoint(config: ModelConfig) -> str:
    """A string that changes when the checkpoint's files do.

    The SHA-256 of a directory's files, the ETags of a mirror's, or the hub's commit: remote weights are not
    downloaded for it. The same weights in two places may therefore be told apart.

    Raises `CheckpointError`.
    """
    directory = fetch_checkpoint(config, settings_only=True)
    if config.source.startswith("s3://"):
        return f"etags:{directory.name}"
    if config.source != "tiny" and not Path(config.source).expanduser().is_dir():
        return f"commit:{directory.name}"
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.name in FILES or path.suffix == ".safetensors":
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 24):
                    digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def quiet_transformers() -> None:
    """No progress bars, and no warnings: it warns about the real checkpoint's own config."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _read_json(path: Path, source: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"model.source: {source} has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model.source: {source}: cannot read {path.name}: {error}") from None
    return value if isinstance(value, dict) else {}


def _fetch_hub(source: str, revision: str | None, settings_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*SETTINGS] if settings_only else [*FILES, "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises a dozen unrelated types: offline, missing, gated, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"model.source: {source} is no directory here and could not be fetched from the hub ({reason})"
        ) from error


def _fetch_s3(source: str, endpoint: str | None, settings_only: bool) -> Path:
    """Mirror the prefix into a folder named after the ETags of all its files."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = source.removeprefix("s3://").partition("/")
    prefix = prefix.rstrip("/") + "/" if prefix else ""
    try:
        client = boto3.client(
            "s3", endpoint_url=endpoint, config=Config(retries={"mode": "standard", "max_attempts": 5})
        )
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
        listing = [item for page in pages for item in page.get("Contents", [])]
        found = {
            item["Key"].removeprefix(prefix): item
            for item in listing
            if item["Key"].removeprefix(prefix) in FILES or item["Key"].endswith((".safetensors", ".index.json"))
        }
        if "config.json" not in found:
            raise CheckpointError(f"model.source: there is no config.json under {source}")
        identity = hashlib.sha256("\n".join(f"{n} {i['ETag']}" for n, i in sorted(found.items())).encode())
        cache_root = Path(os.environ.get("SIGHTLINE_CACHE", "~/.cache/sightline")).expanduser()
        directory = cache_root / identity.hexdigest()
        directory.mkdir(parents=True, exist_ok=True)
        for name in found:
            target = directory / name
            if target.exists() or (settings_only and name not in SETTINGS):
                continue
            # Several actors of one node may fetch at once: the file appears under its name when it is whole.
            with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
                client.download_fileobj(bucket, prefix + name, file)
            os.replace(file.name, target)
    except (BotoCoreError, ClientError) as error:
        raise CheckpointError(f"model.source: cannot read {source}: {error}") from error
    return directory
