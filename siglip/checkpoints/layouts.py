"""Repositories that are not a checkpoint with both towers in the hub's layout: each is refused by its own line.

A line says what the repository is, and which command or which checkpoint to use instead. It knows files and settings,
and does not read weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from siglip.checkpoints.files import ADAPTER, CONFIG, OPEN_CLIP, CheckpointError, read_json

INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", INDEX)
"""The weights that are loaded: one file, or the index of its shards."""
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_EXAMPLE = "google/siglip2-base-patch16-256"


def read_config(directory: Path, source: str) -> dict[str, Any]:
    """Read `config.json`. Raises `CheckpointError` when there is none, or when it is not that of a whole SigLIP.

    The model's type is not checked: the caller knows which types are supported.
    """
    if not (directory / CONFIG).exists():
        if (directory / OPEN_CLIP).exists():
            raise _convert(source, f"its files are those of open_clip ({OPEN_CLIP})")
        if (directory / ADAPTER).exists():
            base = read_json(directory / ADAPTER, source).get("base_model_name_or_path")
            raise _refuse(
                source,
                f"it is an adapter for {base or 'another checkpoint'} ({ADAPTER}): merge the two with peft's "
                "merge_and_unload, save the result, and use that",
            )
    config = read_json(directory / CONFIG, source)
    kinds = [str(kind) for kind in _as_list(config.get("architectures"))]
    model_type = str(config.get("model_type") or "")
    if config.get("auto_map") and (directory / OPEN_CLIP).exists():
        raise _convert(source, f"{CONFIG} asks for code of its own, which is never run, and {OPEN_CLIP} for open_clip")
    if config.get("auto_map"):
        raise _refuse(source, f"{CONFIG} asks for code of its own (auto_map), which is never run: {_use_base(config)}")
    if not model_type and "architecture" in config:
        pooled = " that averages its patches instead of pooling them" if config.get("global_pool") == "avg" else ""
        raise _refuse(
            source, f"it is timm's {config['architecture']}, an image tower{pooled} without a text tower: {_use()}"
        )
    if any(kind.endswith("ForImageClassification") for kind in kinds):
        raise _refuse(
            source, f"it is an image classifier for its own classes, without a text tower: {_use_base(config)}"
        )
    for tower, other in (("vision", "text"), ("text", "image")):
        if model_type.startswith("siglip") and model_type.endswith(f"_{tower}_model"):
            name = "image" if tower == "vision" else tower
            raise _refuse(
                source, f"it has the {name} tower without the {other} tower ({model_type}): {_use_base(config)}"
            )
    if isinstance(config.get("quantization_config"), dict):
        method = config["quantization_config"].get("quant_method") or "unknown method"
        raise _refuse(source, f"its weights are quantized ({method}): {_use_base(config)}")
    return config


def check_weights(directory: Path, source: str) -> None:
    """Raise `CheckpointError` unless there are weights in safetensors, as one file or as shards.

    The folder of a repository of the hub has no other files than those that can be loaded, so that the line for it
    names what may be there.
    """
    if any((directory / name).exists() for name in WEIGHTS):
        list_weights(directory, source)
        return
    if any((directory / name).exists() for name in PICKLES):
        raise _convert(source, f"its weights are in {PICKLES[0]}, which is a pickle")
    if any((directory / name).exists() for name in (OPEN_CLIP, *OPEN_CLIP_WEIGHTS)):
        raise _convert(source, f"it has no {WEIGHTS[0]}, and its files are those of open_clip")
    config = read_json(directory / CONFIG, source)
    if (directory / "onnx").is_dir() or any(directory.glob("*.onnx")):
        raise _refuse(source, f"it has no {WEIGHTS[0]}, only an export to ONNX: {_use_base(config)}")
    raise _refuse(
        source,
        f"it has no {WEIGHTS[0]}: if it has {PICKLES[0]}, convert it with sightline model convert {source} DIRECTORY; "
        f"if it is an export (ONNX, GGUF), {_use_base(config)}",
    )


def list_weights(directory: Path, source: str) -> list[Path]:
    """The paths of a checkpoint's safetensors files: the single file, or the shards that its index names.

    Raises `CheckpointError` for an index without shards, and for a shard that is not a file of this folder: a
    checkpoint's identity has the files of its folder only, so another file could change and nobody would know.
    """
    whole, index = (directory / name for name in WEIGHTS)
    if whole.exists() or not index.exists():
        return [whole]
    shards = read_json(index, source).get("weight_map")
    names = {str(name) for name in shards.values()} if isinstance(shards, dict) else set()
    if not names:
        raise _refuse(source, f"{INDEX} names no shards (weight_map): copy it from where the checkpoint is from")
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise _refuse(
                source, f"{INDEX} names {name}: put all shards beside it, with names that end in .safetensors"
            )
        if not (directory / name).is_file():
            raise _refuse(source, f"{INDEX} names {name}, which is not there: copy it, too")
    return [directory / name for name in sorted(names)]


def _convert(source: str, what: str) -> CheckpointError:
    return _refuse(
        source, f"{what}: run sightline model convert {source} DIRECTORY, and use the directory as model.source"
    )


def _refuse(source: str, what: str) -> CheckpointError:
    return CheckpointError(f"model.source: {source}: {what}")


def _use_base(config: Mapping[str, Any]) -> str:
    """What to use instead: the checkpoint that this one was made from, if its settings name one of the hub."""
    base = str(config.get("_name_or_path") or "")
    return _use(base) if base.count("/") == 1 and not base.startswith((".", "/", "~")) else _use()


def _use(base: str = "") -> str:
    return f"use {base}, from which it was made" if base else f"use one with both towers, such as {_EXAMPLE}"


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
