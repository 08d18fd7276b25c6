"""Small checkpoints in open_clip's layout, with the settings of published ones, and what open_clip computes with them.

open_clip needs torchvision, which is not installed here. So its embeddings were computed once, with open_clip_torch
3.3.0 and timm 1.0.31 on torch 2.13: each checkpoint of `CONFIGS` was loaded strictly into open_clip's `CustomTextCLIP`,
built from the same `open_clip_config.json`, with timm's trunk made as narrow and as short. `open_clip_embeddings.json`
has what `encode_image` and `encode_text` returned for `draw_inputs`, of unit norm, to six decimals.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from siglip.checkpoints.files import write_json
from tests.support.published import NARROWER, SIZES, copy_tokenizer

EMBEDDINGS = Path(__file__).parent / "open_clip_embeddings.json"
VOCABULARY = 512
"""Tokens of the small checkpoints: at least as many as the small tokenizers have."""

CONFIGS: dict[str, tuple[str, str, str, int, dict[str, Any]]] = {
    "ViT-B-16-SigLIP": ("base", "base", "vit_base_patch16_siglip_224", 64, {"proj_bias": True}),
    "ViT-SO400M-14-SigLIP": ("so400m", "so400m", "vit_so400m_patch14_siglip_224", 16, {"proj_bias": True}),
    "ViT-SO400M-14-SigLIP-384": ("so400m", "so400m", "vit_so400m_patch14_siglip_384", 64, {"proj_bias": True}),
    "ViT-SO400M-16-SigLIP-i18n-256": ("so400m", "so400m", "vit_so400m_patch16_siglip_256", 64, {"proj_type": "none"}),
    "ViT-B-16-SigLIP2-256": (
        "base", "base", "vit_base_patch16_siglip_256", 64, {"proj_bias": True, "act_kwargs": {"approximate": "tanh"}},
    ),
    "ViT-L-16-SigLIP2-512": (
        "large", "large", "vit_large_patch16_siglip_512", 64,
        {"proj_bias": True, "act_kwargs": {"approximate": "tanh"}},
    ),
    "ViT-gopt-16-SigLIP2-384": (
        "giant-opt", "so400m", "vit_giantopt_patch16_siglip_384", 64,
        {"proj_bias": True, "act_kwargs": {"approximate": "tanh"}},
    ),
}  # fmt: skip
"""By the name of a timm repository: the sizes of the vision and the text tower, timm's model, the length of texts, and
the keys of `text_cfg` in which the repositories differ."""


def make_settings(name: str) -> dict[str, Any]:
    """The `open_clip_config.json` of a small checkpoint."""
    vision, text, trunk, length, more = CONFIGS[name]
    width, _, _, heads = SIZES[text]
    tokenizer = name if "SigLIP2" in name else "ViT-B-16-SigLIP" + "-i18n-256" * ("i18n" in name)
    ratio = {"mlp_ratio": 3.7362} if text == "so400m" else {}
    return {
        "model_cfg": {
            "embed_dim": SIZES[vision][0] // NARROWER,
            "init_logit_bias": -10,
            "custom_text": True,
            "vision_cfg": {
                "image_size": int(trunk.rpartition("_")[2]),
                "timm_model_name": trunk,
                "timm_model_pretrained": False,
                "timm_pool": "map",
                "timm_proj": "none",
            },
            "text_cfg": {
                "context_length": length,
                "vocab_size": VOCABULARY,
                "hf_tokenizer_name": f"timm/{tokenizer}",
                "tokenizer_kwargs": {"clean": "canonicalize"},
                "width": width // NARROWER,
                "heads": heads,
                "layers": 2,
                "no_causal_mask": True,
                "pool_type": "last",
                "norm_kwargs": {"eps": 1e-6},
                **ratio,
                **more,
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }


def make_weights(name: str) -> dict[str, torch.Tensor]:
    """Random weights with the names and shapes of open_clip's state dict. They are the same on every machine."""
    settings = make_settings(name)["model_cfg"]
    trunk, text = settings["vision_cfg"]["timm_model_name"], settings["text_cfg"]
    width, image = settings["embed_dim"], settings["vision_cfg"]["image_size"]
    patch = int(trunk.split("patch")[1].split("_")[0])
    mlp = int(width * (3.7362 if "so400m" in trunk else 4))
    shapes: dict[str, tuple[int, ...]] = {"logit_scale": (), "logit_bias": ()}

    def add(prefix: str, **parts: tuple[int, ...]) -> None:
        for part, shape in parts.items():
            full = f"{prefix}.{part}"
            shapes[f"{full}.weight"] = shape
            shapes[f"{full}.bias"] = shape[:1]

    shapes["visual.trunk.pos_embed"] = (1, (image // patch) ** 2, width)
    add("visual.trunk", **{"patch_embed.proj": (width, 3, patch, patch), "norm": (width,)})
    for block in range(2):
        attention = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width), "norm2": (width,)}
        add(f"visual.trunk.blocks.{block}", **attention, **{"mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)})
    pool = {"q": (width, width), "kv": (2 * width, width), "proj": (width, width), "norm": (width,)}
    wide = int(width * (3.7362 if "so400m" in trunk else 4))
    shapes["visual.trunk.attn_pool.latent"] = (1, 1, width)
    add("visual.trunk.attn_pool", **pool, **{"mlp.fc1": (wide, width), "mlp.fc2": (width, wide)})
    size = text["width"]
    inner = int(size * text.get("mlp_ratio", 4))
    shapes["text.positional_embedding"] = (text["context_length"], size)
    shapes["text.token_embedding.weight"] = (VOCABULARY, size)
    for block in range(2):
        prefix = f"text.transformer.resblocks.{block}"
        shapes[f"{prefix}.attn.in_proj_weight"], shapes[f"{prefix}.attn.in_proj_bias"] = (3 * size, size), (3 * size,)
        add(prefix, **{"ln_1": (size,), "attn.out_proj": (size, size), "ln_2": (size,)})
        add(prefix, **{"mlp.c_fc": (inner, size), "mlp.c_proj": (size, inner)})
    add("text", ln_final=(size,))
    if text.get("proj_type") != "none":
        add("text", text_projection=(width, size))
    random = np.random.RandomState(1)
    weights = {}
    for key, shape in shapes.items():
        values = random.standard_normal(shape) * (0.2 if len(shape) == 1 else 0.25)
        norm = key.endswith("weight") and len(shape) == 1
        weights[key] = torch.from_numpy(np.asarray(values + norm, np.float32))
    weights["logit_scale"], weights["logit_bias"] = torch.tensor(4.7), torch.tensor(-12.9)
    return weights


def draw_inputs(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Two images, uint8 (2, S, S, 3), and the token ids of two texts, int64 (2, T). Made of random numbers."""
    settings = make_settings(name)["model_cfg"]
    size, random = settings["vision_cfg"]["image_size"], np.random.RandomState(2)
    pixels = random.randint(0, 256, (2, size, size, 3)).astype(np.uint8)
    return pixels, random.randint(0, VOCABULARY, (2, settings["text_cfg"]["context_length"])).astype(np.int64)


def read_embeddings(name: str) -> tuple[np.ndarray, np.ndarray]:
    """What open_clip returned for `draw_inputs`: images and texts, float32 (2, D)."""
    found = json.loads(EMBEDDINGS.read_text())[name]
    return np.asarray(found["images"], np.float32), np.asarray(found["texts"], np.float32)


def make_open_clip(
    name: str, directory: Path, tokenizer: Path | None, weights: dict[str, torch.Tensor] | None = None
) -> Path:
    """Write a small checkpoint of open_clip, with the tokenizer of the checkpoint in `tokenizer`."""
    directory.mkdir(parents=True)
    write_json(directory / "open_clip_config.json", make_settings(name))
    save_file(weights or make_weights(name), directory / "open_clip_model.safetensors")
    if tokenizer is not None:
        copy_tokenizer(tokenizer, directory, CONFIGS[name][3])
    return directory
