"""Every published checkpoint of `tests/support/published.py` in small: loaded with transformers' numbers, or refused.

The reference is transformers' SiglipModel in float32 with its processor on Pillow.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, SiglipForImageClassification, SiglipVisionModel

from siglip.checkpoint import pin_model
from siglip.checkpoints.files import CheckpointError, write_json
from siglip.config import ModelConfig
from tests.support.checkpoints import make_siglip, make_siglip2
from tests.support.parity import embed_here, embed_there, load, lowest_cosine
from tests.support.published import ROWS, Published, make_published


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with a small tokenizer, by family."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {"siglip": make_siglip(folder / "siglip"), "siglip2": make_siglip2(folder / "siglip2")}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_published_shape_has_the_embeddings_of_transformers(
    row: Published, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    directory = make_published(row, tmp_path / "model", tokenizers[row.family])
    pinned = pin_model(ModelConfig(source=str(directory)))
    encoder = load(directory)
    assert (pinned.family, encoder.spec.size, encoder.text_length) == (row.family, row.image, row.length)
    assert lowest_cosine(embed_here(encoder), embed_there(directory, row.length)) >= 0.99999


VISION = {"image_size": 256, "patch_size": 16}
"""What a vision tower alone has at the top of its config.json."""
TIMM = {"num_classes": 0, "num_features": 768, "pretrained_cfg": {"tag": "webli", "input_size": [3, 256, 256]}}
GONE = ("spiece.model", "preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json")
NO_TOWER = "use one with both towers, such as google/siglip2-base-patch16-256"


@dataclass(frozen=True)
class Refused:
    """A repository that is not loaded. `config` are the changed keys of config.json; None leaves out the file.

    `files` are added, `gone` are not there. `lines` is what the error says.
    """

    name: str
    config: dict[str, Any] | None
    lines: str
    files: dict[str, Any] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    whole: bool = False
    """Whether `config` is all of config.json."""


OPEN_CLIP: dict[str, Any] = {"open_clip_config.json": {"model_cfg": {}}, "open_clip_model.safetensors": {}}
REFUSED = (
    Refused(
        "timm/ViT-B-16-SigLIP", None, "run sightline model convert SOURCE DIRECTORY", OPEN_CLIP, ("model.safetensors",)
    ),
    Refused(
        "Marqo/marqo-fashionSigLIP",
        {"architectures": ["MarqoFashionSigLIP"], "auto_map": {"AutoModel": "marqo_fashionSigLIP.MarqoFashionSigLIP"}},
        "code of its own, which is never run, and open_clip_config.json for open_clip: run sightline model convert",
        OPEN_CLIP,
    ),
    Refused(
        "HuggingFaceM4/siglip-so400m-14-980-flash-attn2-navit",
        {"auto_map": {"AutoModel": "modeling_siglip.SiglipModel"}},
        f"code of its own .auto_map., which is never run: {NO_TOWER}",
    ),
    Refused(
        "timm/vit_base_patch16_siglip_gap_256.webli",
        {"architecture": "vit_base_patch16_siglip_gap_256", "global_pool": "avg", **TIMM},
        "timm's vit_base_patch16_siglip_gap_256, an image tower that averages its patches .*without a text tower: use",
        gone=GONE,
        whole=True,
    ),
    Refused(
        "timm/vit_base_patch16_siglip_256.webli",
        {"architecture": "vit_base_patch16_siglip_256", "global_pool": "map", **TIMM},
        f"timm's vit_base_patch16_siglip_256, an image tower without a text tower: {NO_TOWER}",
        gone=GONE,
        whole=True,
    ),
    Refused(
        "a SiglipVisionModel",
        {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model", **VISION},
        r"the image tower without the text tower \(siglip_vision_model\): use one with both towers",
        whole=True,
    ),
    Refused(
        "a SiglipTextModel",
        {"architectures": ["SiglipTextModel"], "model_type": "siglip_text_model"},
        r"the text tower without the image tower \(siglip_text_model\): use one with both towers",
        whole=True,
    ),
    Refused(
        "prithivMLmods/deepfake-detector-model-v1",
        {"architectures": ["SiglipForImageClassification"], "_name_or_path": "google/siglip2-base-patch16-512"},
        "an image classifier for its own classes, without a text tower: use google/siglip2-base-patch16-512, from",
    ),
    Refused(
        "a classifier that was trained from a directory",
        {"architectures": ["SiglipForImageClassification"], "_name_or_path": "./checkpoints/latest"},
        f"an image classifier for its own classes, without a text tower: {NO_TOWER}",
    ),
    Refused(
        "Xenova/siglip-base-patch16-224",
        {"_name_or_path": "google/siglip-base-patch16-224"},
        "no model.safetensors, only an export to ONNX: use google/siglip-base-patch16-224, from which it was made",
        {"onnx/text_model.onnx": {}, "onnx/vision_model.onnx": {}, "tokenizer.json": {}},
        ("model.safetensors", "spiece.model"),
    ),
    Refused(
        "a checkpoint with pytorch_model.bin only",
        {},
        "pytorch_model.bin, which is a pickle: run sightline model convert SOURCE DIRECTORY, and use the directory",
        {"pytorch_model.bin": {}},
        ("model.safetensors",),
    ),
    Refused(
        "a checkpoint without weights", {}, "it has no model.safetensors: if it has pytorch_model.bin, convert it with",
        gone=("model.safetensors",),
    ),
    Refused(
        "a checkpoint quantized with bitsandbytes",
        {"quantization_config": {"quant_method": "bitsandbytes"}, "_name_or_path": "google/siglip2-large-patch16-512"},
        r"weights are quantized \(bitsandbytes\): use google/siglip2-large-patch16-512, from which it was made",
    ),
    Refused(
        "a LoRA adapter",
        None,
        "an adapter for google/siglip-base-patch16-224 .adapter_config.json.: merge the two with peft's",
        {"adapter_config.json": {"base_model_name_or_path": "google/siglip-base-patch16-224"}},
        ("model.safetensors",),
    ),
    Refused("openai/clip-vit-base-patch32", {"model_type": "clip"}, "is a model of type clip, not siglip"),
    Refused(
        "a fine-tune without its processor",
        {},
        "has no preprocessor_config.json: copy it from the checkpoint that this one was made from",
        gone=("preprocessor_config.json",),
    ),
)  # fmt: skip
"""Repositories that are refused. Public reports of what happened elsewhere: michaelfeil/infinity#543 (Marqo's
settings), timm#2178 (gap), optimum#1897 (ONNX), OpenBMB/VisRAG#57 (no settings of images)."""


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_another_repository_is_refused_in_one_line_that_says_what_to_use(
    row: Refused, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / "model"
    shutil.copytree(tokenizers["siglip"], source)
    for name in row.gone:
        (source / name).unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").unlink()
    if row.config is not None:
        write_json(source / "config.json", row.config if row.whole else {**config, **row.config})
    for name, content in row.files.items():
        (source / name).parent.mkdir(exist_ok=True)
        write_json(source / name, content)
    with pytest.raises(CheckpointError, match=row.lines.replace("SOURCE", re.escape(str(source)))) as refused:
        pin_model(ModelConfig(source=str(source)))
    assert str(refused.value).startswith(f"model.source: {source}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", [SiglipForImageClassification, SiglipVisionModel])
def test_what_transformers_saves_without_a_text_tower_is_refused(
    kind: Any, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / "model"
    shutil.copytree(tokenizers["siglip2"], source)
    kind.from_pretrained(source).save_pretrained(source)
    with pytest.raises(CheckpointError, match=r"without (a|the) text tower"):
        pin_model(ModelConfig(source=str(source)))


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_what_transformers_saves_again_is_loaded_with_the_same_numbers(
    family: str, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    """A fine-tune that was saved with a model and its processor: other files, with more keys."""
    saved = tmp_path / "saved"
    AutoModel.from_pretrained(tokenizers[family]).save_pretrained(saved, max_shard_size="200KB")
    AutoProcessor.from_pretrained(tokenizers[family]).save_pretrained(saved)
    assert not (saved / "preprocessor_config.json").exists()
    assert len(list(saved.glob("model-*.safetensors"))) > 1
    for ours, theirs in zip(embed_here(load(saved)), embed_here(load(tokenizers[family])), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("prefix", ["siglip.", "model.", "module.", "_orig_mod.", "_orig_mod.module.model."])
def test_a_prefix_before_every_weight_changes_nothing(prefix: str, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(tokenizers["siglip"], source)
    weights = load_file(source / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in weights.items()}, source / "model.safetensors")
    for ours, theirs in zip(embed_here(load(source)), embed_here(load(tokenizers["siglip"])), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_weights_in_float16_are_computed_in_float32(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """Computing in float16 gives NaN where a value is beyond 65504; a stored value may not be."""
    source = tmp_path / "model"
    shutil.copytree(tokenizers["siglip"], source)
    half = {name: tensor.half() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(half, source / "model.safetensors", metadata={"format": "pt"})
    encoder = load(source)
    assert encoder.dtype == torch.float32
    assert encoder.scale.logit_scale == pytest.approx(float(half["logit_scale"].float().exp()))
    assert lowest_cosine(embed_here(encoder), embed_there(source, 64)) >= 0.99999
    half["text_model.head.bias"][0] = 1e6
    save_file(half, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"not finite: text_model\.head\.bias"):
        load(source)


def test_the_documentation_has_every_repository() -> None:
    """`-256` after a name stands for the same name with another size."""
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    loads, _, refused = page.partition("## Which repositories load")[2].partition("Everything else is refused")
    named: list[str] = []
    for code in re.findall(r"`([^`]+)`", loads):
        named.append(f"{named[-1].rpartition('-')[0]}{code}" if code.startswith("-") else code)
    assert {row.name for row in ROWS} <= set(named)
    assert [name for name in named if name.startswith("google/") and named.count(name) > 1] == []
    unknown = {name for name in named if name.startswith("google/")} - {row.name for row in ROWS}
    assert unknown == {"google/siglip2-base-patch16-naflex", "google/siglip2-so400m-patch16-naflex"}
    for row in REFUSED:
        if "/" in row.name and not row.name.startswith("openai/"):
            assert f"`{row.name}`" in refused
