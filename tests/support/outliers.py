"""Checkpoints whose activations have outlier channels, as those of large trained transformers do."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from siglip.checkpoints.files import TINY


def write_outliers(directory: Path, factor: float, channels: int = 3, seed: int = 0) -> Path:
    """Write the tiny checkpoint with `channels` of each normalised activation `factor` times as large.

    The weights that read these channels are divided by the same factor, so that the model computes the same function.
    Outliers of 20 to 100 times the other channels, in a few channels, are what Dettmers et al. (LLM.int8(), 2022) and
    Xiao et al. (SmoothQuant, 2023) found in transformers.
    """
    shutil.copytree(TINY, directory)
    path = directory / "model.safetensors"
    weights = load_file(path)
    for name in [name for name in weights if name.startswith("vision_model.encoder.") and "layer_norm" in name]:
        layer, _, norm = name.rpartition(".")[0].rpartition(".")
        chosen = torch.randperm(len(weights[name]), generator=torch.Generator().manual_seed(seed))[:channels]
        weights[name][chosen] *= factor
        if not name.endswith(".weight"):
            continue
        readers = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] if norm == "layer_norm1" else ["mlp.fc1"]
        for reader in readers:
            weights[f"{layer}.{reader}.weight"][:, chosen] /= factor
    save_file(weights, path, {"format": "pt"})
    return directory
