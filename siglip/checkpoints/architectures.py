"""Checkpoints with random weights, written in the hub's file layout."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from siglip.checkpoint import quiet_transformers
from siglip.checkpoints.files import IMAGES, TINY, TOKENIZER, write_json
from siglip.checkpoints.settings import describe_spec, describe_tokenizer
from siglip.config import ImageSpec

if TYPE_CHECKING:
    from transformers import SiglipModel

ARCHITECTURES: dict[str, dict[str, dict[str, int]]] = {
    # google/siglip-base-patch16-256. transformers' defaults of the text tower are the base model's.
    "base": {
        "vision": {"image_size": 256, "patch_size": 16},
        "text": {},
    },
    # Costs next to nothing, so that the rest of a job is measured.
    "thin": {
        "vision": {
            "image_size": 256,
            "patch_size": 32,
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 64,
        },
        "text": {
            "vocab_size": 200,
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 64,
            "max_position_embeddings": 16,
            "projection_size": 64,
        },
    },
    "tiny": {
        "vision": {
            "image_size": 64,
            "patch_size": 16,
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 512,
        },
        "text": {
            "vocab_size": 200,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "max_position_embeddings": 16,
            "projection_size": 128,
        },
    },
}
"""By name, the values that differ from the defaults of transformers' `SiglipConfig`."""


def build_model(arch: str, seed: int = 0) -> SiglipModel:
    """A SigLIP with random weights: transformers' initialisation, and SigLIP's initial scale (10) and bias (-10)."""
    import torch
    from transformers import SiglipConfig, SiglipModel

    quiet_transformers()
    sizes = ARCHITECTURES[arch]
    # The id of the tokenizer's `</s>`, which also pads. SigLIP has no token for the start of a text.
    text = {**sizes["text"], "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(seed)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=sizes["vision"]))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10.0))
        model.logit_bias.fill_(-10.0)
    return model


def write_checkpoint(model: SiglipModel, spiece: Path, directory: Path) -> None:
    """Write a model, its preprocessing and a tokenizer with the SentencePiece model `spiece`."""
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    if spiece.resolve() != (directory / "spiece.model").resolve():
        shutil.copyfile(spiece, directory / "spiece.model")
    size = model.config.vision_config.image_size
    length = model.config.text_config.max_position_embeddings
    write_json(directory / IMAGES, describe_spec(ImageSpec(size=size)))
    write_json(directory / TOKENIZER, describe_tokenizer(length))


def init_checkpoint(directory: Path, arch: str, seed: int = 0) -> int:
    """Write a checkpoint with random weights of a known architecture. Returns its number of parameters.

    The tokenizer is that of the tiny checkpoint: its few ids are valid in any vocabulary. Raises `FileExistsError`
    when the directory is not empty.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} is not empty: give a new directory")
    model = build_model(arch, seed)
    write_checkpoint(model, TINY / "spiece.model", directory)
    return sum(parameter.numel() for parameter in model.parameters())
