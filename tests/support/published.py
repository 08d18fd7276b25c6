"""Published checkpoints: the settings of each, and small ones with random weights that have the same shape.

A row has the settings of the repository's own files: sizes in pixels, patch, length of texts, vocabulary, projection,
tokenizer and resampling filter. They were read from transformers' conversion scripts for SigLIP and SigLIP 2, and from
the model configurations of open_clip 3.3.0 and timm 1.0.31. The files of medsiglip-448 are behind a licence: its row is
so400m's at the size that its name says, with SigLIP's tokenizer. `make_published` writes the same files with the same
keys. It divides the widths, and has two layers and the vocabulary of the small tokenizers of
`tests/support/checkpoints.py`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siglip.checkpoint import quiet_transformers
from siglip.checkpoints.files import TOKENIZER, write_json
from siglip.checkpoints.settings import describe_spec
from siglip.config import ImageSpec

SIZES = {
    "base": (768, 3072, 12, 12),
    "large": (1024, 4096, 24, 16),
    "so400m": (1152, 4304, 27, 16),
    "giant-opt": (1536, 6144, 40, 16),
}
"""Width, width of the MLP, layers and attention heads of a tower."""
NARROWER = 8
"""The small checkpoints' widths are divided by this number, and their heads are as many: 72 dimensions become 9."""


@dataclass(frozen=True)
class Published:
    """A repository of the hub that is loaded as it is.

    `tower` and `text` are keys of `SIZES`. `vocabulary` is the number of tokens, and `length` that of a text.
    """

    name: str
    tower: str
    patch: int
    image: int
    vocabulary: int = 32000
    length: int = 64
    text: str = ""

    @property
    def family(self) -> str:
        """The name of its family, which its tokenizer decides."""
        return "siglip2" if self.vocabulary == 256000 else "siglip"

    @property
    def projects(self) -> bool:
        """Whether its text tower is narrower than its embeddings."""
        return bool(self.text) and self.text != self.tower


ROWS = (
    Published("google/siglip-base-patch16-224", "base", 16, 224),
    Published("google/siglip-base-patch16-256", "base", 16, 256),
    Published("google/siglip-base-patch16-256-multilingual", "base", 16, 256, 250000),
    Published("google/siglip-base-patch16-256-i18n", "base", 16, 256, 250000),
    Published("google/siglip-base-patch16-384", "base", 16, 384),
    Published("google/siglip-base-patch16-512", "base", 16, 512),
    Published("google/siglip-large-patch16-256", "large", 16, 256),
    Published("google/siglip-large-patch16-384", "large", 16, 384),
    Published("google/siglip-so400m-patch14-224", "so400m", 14, 224, length=16),
    Published("google/siglip-so400m-patch14-384", "so400m", 14, 384),
    Published("google/siglip-so400m-patch16-256-i18n", "so400m", 16, 256, 250000),
    Published("google/medsiglip-448", "so400m", 14, 448),
    Published("google/siglip2-base-patch32-256", "base", 32, 256, 256000),
    *(Published(f"google/siglip2-base-patch16-{size}", "base", 16, size, 256000) for size in (224, 256, 384, 512)),
    *(Published(f"google/siglip2-large-patch16-{size}", "large", 16, size, 256000) for size in (256, 384, 512)),
    *(Published(f"google/siglip2-so400m-patch14-{size}", "so400m", 14, size, 256000) for size in (224, 384)),
    *(Published(f"google/siglip2-so400m-patch16-{size}", "so400m", 16, size, 256000) for size in (256, 384, 512)),
    *(
        Published(f"google/siglip2-giant-opt-patch16-{size}", "giant-opt", 16, size, 256000, text="so400m")
        for size in (256, 384)
    ),
)
"""The repositories that are loaded as they are."""


def shrink(size: str) -> dict[str, int]:
    """The settings of a small tower with the ratios of one of `SIZES`."""
    width, mlp, _, heads = SIZES[size]
    return {
        "hidden_size": width // NARROWER,
        "intermediate_size": mlp // NARROWER,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
    }


def make_published(row: Published, directory: Path, tokenizer: Path) -> Path:
    """Write a small checkpoint with a row's shape, and the tokenizer of the checkpoint in `tokenizer`."""
    directory.mkdir(parents=True)
    vocabulary = json.loads((tokenizer / "config.json").read_text())["text_config"]["vocab_size"]
    vision = {**shrink(row.tower), "image_size": row.image, "patch_size": row.patch}
    text: dict[str, Any] = {**shrink(row.text or row.tower), "vocab_size": vocabulary}
    if row.length != 64:
        text["max_position_embeddings"] = row.length
    # SigLIP's width is projected to itself: its config.json has no projection_size, or that width.
    text["projection_size"] = vision["hidden_size"]
    save_random(vision, text, directory)
    if not row.projects:
        del text["projection_size"]
    write_json(
        directory / "config.json",
        {
            "architectures": ["SiglipModel"],
            "initializer_factor": 1.0,
            "model_type": "siglip",
            "text_config": {"model_type": "siglip_text_model", **text},
            "torch_dtype": "float32",
            "vision_config": {"model_type": "siglip_vision_model", **vision},
        },
    )
    write_json(
        directory / "preprocessor_config.json",
        describe_spec(ImageSpec(size=row.image, resample=2 if row.family == "siglip2" else 3)),
    )
    copy_tokenizer(tokenizer, directory, row.length)
    return directory


def save_random(vision: dict[str, Any], text: dict[str, Any], directory: Path, seed: int = 7) -> None:
    """Write the weights of transformers' model with random weights, in which no bias and no scale is a round number."""
    import torch
    from transformers import SiglipConfig, SiglipModel

    quiet_transformers()
    torch.manual_seed(seed)
    model = SiglipModel(SiglipConfig(vision_config=dict(vision), text_config=dict(text)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        model.logit_scale.fill_(4.7)
        model.logit_bias.fill_(-12.9)
    model.save_pretrained(directory)


def copy_tokenizer(tokenizer: Path, directory: Path, length: int) -> None:
    """Copy a checkpoint's tokenizer, for texts of `length` tokens."""
    for name in ("spiece.model", "tokenizer.json", "special_tokens_map.json"):
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, directory / name)
    settings = json.loads((tokenizer / TOKENIZER).read_text())
    write_json(directory / TOKENIZER, {**settings, "model_max_length": length})
