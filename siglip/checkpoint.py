"""Checkpoints: reading their settings, and pinning their identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siglip.checkpoints.files import (
    CONFIG,
    FILES,
    SETTINGS,
    TOKENIZER,
    TOKENIZER_EXTRAS,
    CheckpointError,
    PrefixMirror,
    locate,
    read_json,
)
from siglip.checkpoints.layouts import check_weights, read_config
from siglip.checkpoints.settings import Architecture, choose_size, parse, read_spec
from siglip.config import ImageSpec, ModelConfig
from siglip.families import FAMILIES, Family, recognize_family
from siglip.families.text_rules import RULES, choose_family

_SMALL_FLOPS = 1e9


@dataclass(frozen=True)
class PinnedModel:
    """A checkpoint pinned to one version: loading it on another machine gives the same weights or an error.

    `config` is the user's, with a branch of the hub resolved to its commit. `identity` changes when a file changes: it
    is the SHA-256 of a directory's files, the ETags of files in an object store, or the hub's commit. The same weights
    in two places may therefore have two identities. With another image size than the checkpoint's own, the identity
    begins with it ("378px sha256:..."), because embeddings of two sizes are not to be compared.
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
    def new_size(self) -> int | None:
        """Width and height of images in pixels, if `model.image_size` asks for others than the checkpoint's own."""
        return _find_new_size(self.spec, self.architecture)

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
        tokens = ((self.spec.size or vision.image_size) // vision.patch_size) ** 2
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
        now = None if weights else (*SETTINGS, *self.rule.FILES, *TOKENIZER_EXTRAS)
        directory, files = locate(self.config, self.mirror, now)
        identity = _identify(files, self.new_size)
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
    directory, files = locate(config, mirror, SETTINGS)
    source = config.source
    settings = read_config(directory, source)
    _check_type(settings, source)
    if files.startswith("sha256:"):
        check_weights(directory, source)
    architecture = parse(settings, Architecture, CONFIG, source)
    vision, text = architecture.vision_config, architecture.text_config
    if (text.projection_size or text.hidden_size) != vision.hidden_size:
        raise CheckpointError(
            f"model.source: {source}: {CONFIG}: text embeddings have {text.projection_size or text.hidden_size} "
            f"numbers (text_config.projection_size), and image embeddings have {vision.hidden_size} "
            "(vision_config.hidden_size)"
        )
    tokenizer = read_json(directory / TOKENIZER, source) if (directory / TOKENIZER).exists() else {}
    # Only the settings of a remote checkpoint are downloaded yet, so all files are assumed to exist.
    here = {path.name for path in directory.iterdir()} if files.startswith("sha256:") else FILES
    family = recognize_family(tokenizer, here)
    if family is None:
        known = ", ".join(f"{known.CLASSES[0]} with {' or '.join(known.FILES)}" for known in RULES.values())
        raise CheckpointError(
            f"model.source: {source}: {TOKENIZER}: tokenizer_class {tokenizer.get('tokenizer_class') or 'missing'}: "
            f"expected that of a known family ({known})"
        )
    if files.startswith("commit:"):
        config = config.model_copy(update={"revision": files.removeprefix("commit:")})
    spec = read_spec(directory, vision.image_size, source)
    if config.image_size is not None:
        spec = spec.model_copy(update={"size": choose_size(config.image_size, vision)})
    return PinnedModel(
        config,
        _identify(files, _find_new_size(spec, architecture)),
        spec,
        choose_family(family, config.text_rule).NAME,
        architecture,
        mirror,
    )


def _find_new_size(spec: ImageSpec, architecture: Architecture) -> int | None:
    return None if spec.size == architecture.vision_config.image_size else spec.size


def _identify(files: str, new_size: int | None) -> str:
    """The identity of a checkpoint's files, with the size of images if it is not the checkpoint's own."""
    return files if new_size is None else f"{new_size}px {files}"


def _check_type(model: Mapping[str, Any], source: str) -> None:
    kind = model.get("model_type")
    if kind == "siglip2":
        raise CheckpointError(
            f"model.source: {source} is a NaFlex model, for images of any shape, which is not supported: use a "
            "SigLIP 2 checkpoint of fixed resolution, such as google/siglip2-base-patch16-256"
        )
    if kind != "siglip":
        raise CheckpointError(f"model.source: {source} is a model of type {kind or 'unknown'}, not siglip")


def quiet_transformers() -> None:
    """Turn off transformers' progress bars and warnings. It warns about the published checkpoints' own config."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _short(identity: str) -> str:
    kind, _, value = identity.partition(":")
    return f"{kind} {value[:12]}"
