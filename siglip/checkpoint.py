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
    shorten_identity,
)
from siglip.checkpoints.layouts import check_weights, read_config
from siglip.checkpoints.settings import (
    Architecture,
    NaFlexArchitecture,
    NaFlexSettings,
    choose_patches,
    choose_size,
    parse,
    read_naflex_spec,
    read_spec,
)
from siglip.config import ImageSpec, ModelConfig
from siglip.families import FAMILIES, Family, recognize_family
from siglip.families.text_rules import RULES, choose_family

_SMALL_FLOPS = 1e9


@dataclass(frozen=True)
class PinnedModel:
    """A checkpoint pinned to one version: loading it on another machine gives the same weights or an error.

    `config` is the user's, with a branch of the hub resolved to its commit, and without `patches` if they are the
    checkpoint's own. `checkpoint` changes when a file changes: it is the SHA-256 of a directory's files, the ETags of
    files in an object store, or the hub's commit. The same weights in two places may therefore have two of them.
    """

    config: ModelConfig
    checkpoint: str
    spec: ImageSpec
    family: str
    architecture: Architecture | NaFlexArchitecture
    mirror: PrefixMirror | None = None

    @property
    def identity(self) -> str:
        """What makes the embeddings: the checkpoint and, if it is not the checkpoint's own, the size of images.

        With another size the identity begins with it ("378px sha256:...", "1024patches sha256:..."), because embeddings
        of two sizes are not to be compared.
        """
        if self.config.patches is not None:
            return f"{self.config.patches}patches {self.checkpoint}"
        return self.checkpoint if self.new_size is None else f"{self.new_size}px {self.checkpoint}"

    @property
    def width(self) -> int:
        """D, the embedding's length: the vision tower's width. `SiglipConfig.projection_dim` is wrong."""
        return self.architecture.vision_config.hidden_size

    @property
    def new_size(self) -> int | None:
        """Width and height of images in pixels, if `model.image_size` asks for others than the checkpoint's own."""
        vision = self.architecture.vision_config
        return None if isinstance(vision, NaFlexSettings) or self.spec.size == vision.image_size else self.spec.size

    @property
    def text_length(self) -> int:
        """Number of tokens of a text that the model reads."""
        return self.architecture.text_config.max_position_embeddings

    @property
    def image_tokens(self) -> int:
        """Number of patches that the vision tower computes for an image, in a NaFlex model also for empty places."""
        if self.spec.patches is not None:
            return self.spec.patches.count
        assert self.spec.size is not None
        return int((self.spec.size // self.architecture.vision_config.patch_size) ** 2)

    @property
    def vision_flops(self) -> float:
        """Floating-point operations to embed one image, to within a few per cent: 44e9 for base at 256 x 256.

        Counts the transformer's matrix products: 8 D^2 for the attention's projections, 4 T D for the attention itself
        and 4 D M for the MLP of width M, for each of T tokens and each layer.
        """
        vision, tokens = self.architecture.vision_config, self.image_tokens
        width = vision.hidden_size
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
        directory, found = locate(self.config, self.mirror, now)
        if found != self.checkpoint:
            raise CheckpointError(
                f"model.source: {self.config.source} is another checkpoint here ({shorten_identity(found)}) than "
                f"the one with which the run started ({shorten_identity(self.checkpoint)}): put the same files on all "
                "machines, or pin a revision"
            )
        return directory


def pin_model(config: ModelConfig, mirror: PrefixMirror | None = None) -> PinnedModel:
    """Find a checkpoint, read its settings and pin its version. Does not download weights.

    Raises `CheckpointError` when there is no such checkpoint, or when it is not a SigLIP of a supported family.
    """
    directory, files = locate(config, mirror, SETTINGS)
    source = config.source
    architecture = _read_architecture(read_config(directory, source), source)
    if files.startswith("sha256:"):
        check_weights(directory, source)
    vision, text = architecture.vision_config, architecture.text_config
    if (text.projection_size or text.hidden_size) != vision.hidden_size:
        raise CheckpointError(
            f"model.source: {source}: {CONFIG}: text embeddings have {text.projection_size or text.hidden_size} "
            f"numbers (text_config.projection_size), and image embeddings have {vision.hidden_size} "
            "(vision_config.hidden_size)"
        )
    tokenizer = read_json(directory / TOKENIZER, source) if (directory / TOKENIZER).exists() else {}
    if tokenizer.get("fast_tokenizer_files") not in (None, [], ["tokenizer.json"]):
        raise CheckpointError(
            f"model.source: {source}: {TOKENIZER}: fast_tokenizer_files names other files than tokenizer.json, which "
            "are no part of a checkpoint: remove the key"
        )
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
    spec = _read_images(architecture, directory, source)
    if config.patches is not None:
        own, spec = spec, choose_patches(config.patches, spec)
        config = config if spec != own else config.model_copy(update={"patches": None})
    if config.image_size is not None:
        spec = spec.model_copy(update={"size": choose_size(config.image_size, vision)})
    return PinnedModel(
        config,
        files,
        spec,
        choose_family(family, config.text_rule).NAME,
        architecture,
        mirror,
    )


def _read_architecture(model: Mapping[str, Any], source: str) -> Architecture | NaFlexArchitecture:
    """Read a `config.json`. The type siglip2 is that of NaFlex models: SigLIP 2 of fixed resolution has siglip."""
    kind = model.get("model_type")
    if kind == "siglip2":
        return parse(model, NaFlexArchitecture, CONFIG, source)
    if kind != "siglip":
        raise CheckpointError(f"model.source: {source} is a model of type {kind or 'unknown'}, not siglip")
    return parse(model, Architecture, CONFIG, source)


def _read_images(architecture: Architecture | NaFlexArchitecture, directory: Path, source: str) -> ImageSpec:
    if isinstance(architecture, NaFlexArchitecture):
        return read_naflex_spec(directory, architecture.vision_config.patch_size, source)
    return read_spec(directory, architecture.vision_config.image_size, source)


def quiet_transformers() -> None:
    """Turn off transformers' progress bars and warnings. It warns about the published checkpoints' own config."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
