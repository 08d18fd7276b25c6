"""The settings in a checkpoint's JSON files that count, with transformers' defaults."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from siglip.checkpoints.files import CONFIG, IMAGES, PROCESSOR, CheckpointError, read_json
from siglip.config import LEAST_PATCH, LEAST_PATCHES, MOST_PATCH, MOST_PATCHES, ImageSpec, PatchBudget

_Count = Annotated[int, Field(gt=0, strict=True)]
_Settings = TypeVar("_Settings", bound=BaseModel)
_AnyImages = TypeVar("_AnyImages", bound="_Images")


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


class NaFlexSettings(TowerSettings):
    """A `vision_config`, as transformers' `Siglip2VisionConfig` reads it.

    `num_patches` is the number of learned position embeddings, a square grid. It is not the most patches of an image.
    """

    patch_size: Annotated[int, Field(ge=LEAST_PATCH, le=MOST_PATCH, strict=True)] = 16
    num_patches: _Count = 256
    num_channels: Literal[3] = 3
    vision_use_head: Literal[True] = True

    @model_validator(mode="after")
    def _check_grid(self) -> Self:
        if math.isqrt(self.num_patches) ** 2 != self.num_patches:
            raise ValueError(f"{self.num_patches} patches are no square grid")
        return self


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


class NaFlexArchitecture(BaseModel):
    """A `config.json` of a NaFlex model. Missing values are those of `google/siglip2-base-patch16-naflex`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    vision_config: NaFlexSettings = NaFlexSettings()
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
    do_center_crop: bool | None = False
    do_pad: bool | None = False
    image_processor_type: str = ""
    feature_extractor_type: str = ""


class _NaFlexImages(_Images):
    """The keys that count, with the defaults of transformers' `Siglip2ImageProcessor`."""

    resample: Annotated[int, Field(ge=0, le=5, strict=True)] = 2
    image_processor_type: str = "Siglip2ImageProcessor"
    patch_size: _Count = 16
    max_num_patches: Annotated[int, Field(ge=LEAST_PATCHES, le=MOST_PATCHES, strict=True)] = 256


def read_spec(directory: Path, trained: int, source: str) -> ImageSpec:
    """Read the preprocessing of a model for square images. Raises `CheckpointError`."""
    images, name = _read_images(directory, _Images, source)
    for key in ("image_processor_type", "feature_extractor_type"):
        kind = getattr(images, key)
        if kind and not kind.startswith("SiglipImageProcessor"):
            raise CheckpointError(
                f"model.source: {source}: {name}: {key} {kind} prepares images in another way than the "
                "SiglipImageProcessor of SigLIP: copy the file from the checkpoint that this one was made from"
            )
        if kind:
            break  # the newer key counts, as in transformers
    for key in ("do_center_crop", "do_pad"):
        if getattr(images, key):
            raise CheckpointError(
                f"model.source: {source}: {name}: {key}: true is not supported, because no SigLIP was trained so"
            )
    size = {"height": trained, "width": trained}
    if not isinstance(images.size, dict) or {k: v for k, v in images.size.items() if v is not None} != size:
        raise CheckpointError(
            f"model.source: {source}: {name}: size {images.size!r} is not the {trained} x {trained} pixels of "
            f"{CONFIG}: expected {json.dumps(size)}"
        )
    return ImageSpec(size=trained, resample=images.resample, **_read_colors(images))


def read_naflex_spec(directory: Path, patch: int, source: str) -> ImageSpec:
    """Read the preprocessing of a NaFlex model with patches of `patch` x `patch` pixels. Raises `CheckpointError`."""
    images, name = _read_images(directory, _NaFlexImages, source)
    if not images.image_processor_type.startswith("Siglip2ImageProcessor"):
        raise CheckpointError(
            f"model.source: {source}: {name}: image_processor_type {images.image_processor_type} is not the "
            f"Siglip2ImageProcessor of the model_type siglip2 of {CONFIG}, which is for NaFlex models"
        )
    if images.patch_size != patch:
        raise CheckpointError(
            f"model.source: {source}: {name}: patch_size {images.patch_size} is not the {patch} of {CONFIG}"
        )
    patches = PatchBudget(size=patch, count=images.max_num_patches)
    return ImageSpec(patches=patches, resample=images.resample, **_read_colors(images))


def _read_images(directory: Path, kind: type[_AnyImages], source: str) -> tuple[_AnyImages, str]:
    """Read the preprocessing from its own file or, as transformers 5 writes it, from the processor's file.

    Also returns the file's name.
    """
    name = IMAGES
    nested = read_json(directory / PROCESSOR, source) if (directory / PROCESSOR).exists() else {}
    if isinstance(nested.get("image_processor"), dict):
        name, given = PROCESSOR, nested["image_processor"]
    elif (directory / IMAGES).exists():
        given = read_json(directory / IMAGES, source)
    else:
        raise CheckpointError(
            f"model.source: {source} has no {IMAGES}: copy it from the checkpoint that this one was made from"
        )
    images = parse(given, kind, name, source)
    if name == PROCESSOR and (directory / IMAGES).exists():
        _compare_images(images, parse(read_json(directory / IMAGES, source), kind, IMAGES, source), source)
    for key, wanted in (("do_resize", True), ("do_rescale", True), ("do_normalize", True)):
        if getattr(images, key) is not wanted:
            raise CheckpointError(
                f"model.source: {source}: {name}: {key}: false is not supported, because no SigLIP was trained so"
            )
    if abs(images.rescale_factor * 255 - 1) > 1e-6:
        raise CheckpointError(
            f"model.source: {source}: {name}: rescale_factor: expected 1/255 (given: {images.rescale_factor!r})"
        )
    return images, name


def _compare_images(images: _Images, others: _Images, source: str) -> None:
    """Raise `CheckpointError` if the two files differ: versions of transformers differ in which one they read."""
    names = {"image_processor_type", "feature_extractor_type"}  # each file's is checked, or says Fast in one of them
    ours, theirs = (one.model_dump(exclude=names) for one in (images, others))
    for key, value in ours.items():
        if value != theirs[key]:
            raise CheckpointError(
                f"model.source: {source}: {key} is {value!r} in {PROCESSOR} and {theirs[key]!r} in {IMAGES}: remove "
                f"the file that is wrong (transformers 5 reads {PROCESSOR})"
            )


def _read_colors(images: _Images) -> dict[str, Any]:
    return {"mean": tuple(images.image_mean), "std": tuple(images.image_std)}


def describe_spec(spec: ImageSpec) -> dict[str, Any]:
    """The `preprocessor_config.json` that `read_spec` reads as `spec`."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "SiglipProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": spec.size, "width": spec.size},
        "resample": spec.resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def describe_tokenizer(length: int) -> dict[str, Any]:
    """The `tokenizer_config.json` of a checkpoint with SigLIP's tokenizer, for texts of `length` tokens."""
    return {
        "tokenizer_class": "SiglipTokenizer",
        "processor_class": "SiglipProcessor",
        "do_lower_case": True,
        "model_max_length": length,
        # Without this, transformers makes an attention mask, which changes the scores.
        "model_input_names": ["input_ids"],
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
    }


def choose_size(size: int, vision: VisionSettings | NaFlexSettings) -> int:
    """The width and height of images for `model.image_size`: the checkpoint's own, or a multiple of its patch.

    The checkpoint's own size may be no multiple: of 384 pixels, patches of 14 cover 378. Raises `CheckpointError`.
    """
    if isinstance(vision, NaFlexSettings):
        raise CheckpointError(
            "model.image_size: a NaFlex checkpoint keeps an image's proportions: set model.patches, or leave both out"
        )
    patch = vision.patch_size
    if size % patch and size != vision.image_size:
        below = size // patch * patch
        near = " or ".join(str(one) for one in (below, below + patch) if one)
        raise CheckpointError(
            f"model.image_size: {size} is no multiple of {patch}, the size of the checkpoint's patches: use {near}, or "
            f"leave it out for the checkpoint's own {vision.image_size}"
        )
    return size


def choose_patches(count: int, spec: ImageSpec) -> ImageSpec:
    """The preprocessing with the number of patches of `model.patches`. Raises `CheckpointError`."""
    if spec.patches is None:
        raise CheckpointError(
            f"model.patches: this checkpoint sees {spec.describe()}, and only NaFlex checkpoints have a number of "
            "patches to choose: leave it out, or set model.image_size"
        )
    return spec.model_copy(update={"patches": spec.patches.model_copy(update={"count": count})})


def parse(values: Mapping[str, Any], kind: type[_Settings], name: str, source: str) -> _Settings:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"model.source: {source}: {name}: {where}: {first['msg']} (given: {str(first['input'])[:60]})"
        ) from None
