"""The model that made an output: embeddings of texts and images that are compared with the output's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curation.tagged_output import TaggedOutput
from siglip.checkpoint import pin_model
from siglip.checkpoints.files import shorten_identity
from siglip.config import Limits, ModelConfig
from siglip.families import FAMILIES
from siglip.labels import LabelSet
from siglip.scoring import Floats
from storage.mirror import Mirror
from storage.settings import ConfigError
from storage.store import StoreOptions

if TYPE_CHECKING:
    from siglip.encoder import Encoder


def find_texts(output: TaggedOutput, labels: LabelSet) -> Floats | None:
    """Return the averaged prompt embeddings of a label set, float32 (L, D), if the output holds all of them.

    Then no model is needed: for other thresholds, bands, groups or calibrations, for fewer labels or another order.
    Returns None if the label set has a label with prompts that no label of the output has.
    """
    old = output.table
    known = {
        tuple(prompts): old.head.vectors[row]
        for row, (prompts, label) in enumerate(zip(old.prompts, old.labels.names, strict=True))
        if label.probe is None
    }
    empty = np.zeros(output.width, np.float32)  # for probes, which have no prompts
    rows = [known.get(tuple(prompts)) if prompts else empty for prompts in labels.prompts(FAMILIES[old.family])]
    return None if any(row is None for row in rows) else np.asarray(rows, np.float32)


def fit_machine(config: ModelConfig) -> ModelConfig:
    """The settings with which this machine embeds a few texts or images beside those of an output: never compiled.

    An output's device and int8 are for the machines that made it. Where they cannot be had, embeddings are those that
    `auto` gives: the same for texts, and for images as near to those of int8 as the bound `min_cosine` asks.
    """
    from siglip.encoder import DeviceError, choose_device, choose_dtype

    config = config.model_copy(update={"compile": False})
    try:
        choose_dtype(config, choose_device(config, 0))
    except DeviceError:
        return config.model_copy(update={"dtype": "auto", "device": "auto"})
    return config


class OutputModel:
    """The model of an output. Its weights are loaded when they are first needed.

    `config` replaces the model that the output names, whose source may no longer be there. The machine need not be one
    that could have made the output: see `fit_machine`. Every method raises
    `ConfigError` if the checkpoint is another one than the output's, and `siglip.checkpoints.files.CheckpointError` if
    it cannot be used.
    """

    def __init__(self, output: TaggedOutput, config: ModelConfig | None = None) -> None:
        self._output = output
        self._config = config or output.table.model

    def embed_labels(self, labels: LabelSet) -> Floats:
        """Return the averages of each label's prompt embeddings, float32 (L, D) of unit norm.

        Those that the output holds are taken from it, if it holds all of them. Raises `siglip.labels.LabelError` for
        labels that the model cannot read or tell apart.
        """
        known = find_texts(self._output, labels)
        return self._encoder.embed_labels(labels) if known is None else known

    def embed_images(self, files: Sequence[Path]) -> Floats:
        """Embed the images in some files: float32 (N, D) of unit norm. Raises `ConfigError` for one that is none."""
        images = []
        for file in files:
            try:
                images.append((str(file), file.read_bytes()))
            except OSError as error:
                raise ConfigError(f"{file}: {error.strerror or error}") from error
        return self.embed_image_bytes(images)

    def embed_image_bytes(self, images: Sequence[tuple[str, bytes]]) -> Floats:
        """Embed images, each a name for messages and the bytes of a file: float32 (N, D) of unit norm.

        Raises `ConfigError` for bytes that are no image.
        """
        from siglip.images.decode import ImageRejected, decode_image

        pixels = []
        for name, data in images:
            try:
                pixels.append(decode_image(data, self._encoder.spec, Limits(), "auto").pixels)
            except ImageRejected as error:
                detail = f": {error.detail}" if error.detail else ""
                raise ConfigError(f"{name}: {error.reason}{detail}") from error
        return self._encoder.embed_images(np.stack(pixels))

    def load(self) -> None:
        """Load the model now."""
        _ = self._encoder

    @cached_property
    def _encoder(self) -> Encoder:
        from siglip.encoder import Encoder

        output, config = self._output, fit_machine(self._config)
        model = pin_model(config, Mirror(StoreOptions.from_environment(config.endpoint)))
        if model.identity != output.weights:
            raise ConfigError(
                f"{output.uri} has embeddings of the model {shorten_identity(output.weights)}, and {config.source} is "
                f"{shorten_identity(model.identity)}: name the checkpoint that tagged it with --model"
            )
        return Encoder(model)
