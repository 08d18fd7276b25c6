"""Checkpoints that are incomplete, invalid or of another kind are refused in one line that says what to change."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipModel

from siglip.checkpoint import pin_model
from siglip.checkpoints.files import TINY, CheckpointError
from siglip.config import ModelConfig
from siglip.encoder import Encoder

PATCHES = "vision_model.embeddings.patch_embedding.weight"
Weights = dict[str, torch.Tensor]


def copy_tiny(
    directory: Path,
    weights: Callable[[Weights], Weights] | None = None,
    **settings: Callable[[dict[str, Any]], Any],
) -> str:
    """The tiny checkpoint with changed weights or settings, as a `model.source`."""
    shutil.copytree(TINY, directory)
    if weights:
        path = directory / "model.safetensors"
        save_file(weights(load_file(path)), path, metadata={"format": "pt"})
    for name, change in settings.items():
        path = directory / f"{name}.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return str(directory)


def load(source: str, **options: Any) -> Encoder:
    return Encoder(pin_model(ModelConfig(source=source, dtype="float32", compile=False)), **options)


def without(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if not name.startswith(prefix)}


WRONG_WEIGHTS: list[tuple[str, Callable[[Weights], Weights], str]] = [
    ("no text tower", without("text_model"), "missing: text_model.embeddings.position_embedding.weight"),
    ("no logit scale", without("logit_scale"), r"\(missing: logit_scale\)"),
    (
        "a prefix before some names",
        lambda w: {f"_orig_mod.{n}" if n.startswith("vision") else n: v for n, v in w.items()},
        "not this model's: _orig_mod.vision",
    ),
    ("int8", lambda w: {**w, PATCHES: w[PATCHES].to(torch.int8)}, rf"\(quantized: {PATCHES}\)"),
    ("float8", lambda w: {**w, PATCHES: w[PATCHES].to(torch.float8_e4m3fn)}, rf"\(quantized: {PATCHES}\)"),
    (
        "a missing layer",
        without("vision_model.encoder.layers.3."),
        r"missing: vision_model.encoder.layers.3.\S+.* more",
    ),
    ("another shape", lambda w: {**w, PATCHES: torch.zeros(128, 3, 8, 8)}, rf"\(of another shape: {PATCHES}\)"),
    ("two logit scales", lambda w: {**w, "logit_scale": torch.zeros(2)}, r"\(of another shape: logit_scale\)"),
    (
        "an infinite scale",
        lambda w: {**w, "logit_scale": torch.full((1,), 100.0)},
        "logit_scale is inf, and scores need",
    ),
    ("a scale of 0", lambda w: {**w, "logit_scale": torch.full((1,), -200.0)}, "logit_scale is 0, and scores need"),
    ("NaN", lambda w: {**w, PATCHES: w[PATCHES] * float("nan")}, rf"\(not finite: {PATCHES}\)"),
    (
        "an additional layer",
        lambda w: {**w, "vision_model.encoder.layers.4.x": torch.ones(1)},
        r"not this model's: \S+4.x\)",
    ),
]


@pytest.mark.parametrize(("change", "message"), [c[1:] for c in WRONG_WEIGHTS], ids=[c[0] for c in WRONG_WEIGHTS])
def test_wrong_weights_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    source = copy_tiny(tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=message) as refused:
        load(source, texts=False)
    assert str(refused.value).startswith(f"model.source: {source}: ")
    assert "\n" not in str(refused.value)


IMAGES, MODEL, TOKENIZER = "preprocessor_config", "config", "tokenizer_config"
INVALID_SETTINGS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    (IMAGES, lambda c: {**c, "resample": None}, r"preprocessor_config\.json: resample: .*None"),
    (IMAGES, lambda c: {**c, "resample": 9}, r"preprocessor_config\.json: resample: .*9"),
    (IMAGES, lambda c: {**c, "image_mean": [0.5]}, r"preprocessor_config\.json: image_mean: "),
    (IMAGES, lambda c: {**c, "image_mean": [0.5, 0.5, float("nan")]}, r"preprocessor_config\.json: image_mean\.2: "),
    (IMAGES, lambda c: {**c, "image_std": [0.5, 0, 0.5]}, r"preprocessor_config\.json: image_std\.1: "),
    (IMAGES, lambda c: {**c, "image_std": None}, r"preprocessor_config\.json: image_std: "),
    (IMAGES, lambda c: {**c, "size": {"shortest_edge": 64}}, "is not the 64 x 64 pixels of config.json"),
    (IMAGES, lambda c: {**c, "size": "64"}, "is not the 64 x 64 pixels of config.json"),
    (IMAGES, lambda c: {**c, "size": {"height": 32, "width": 32}}, "is not the 64 x 64 pixels of config.json"),
    (IMAGES, lambda c: {**c, "size": 64}, r'size 64 is not .*: expected {"height": 64, "width": 64}'),
    (IMAGES, lambda c: {**c, "size": {**c["size"], "shortest_edge": 64}}, "shortest_edge.* is not the 64 x 64 pixels"),
    (IMAGES, lambda c: {**c, "do_center_crop": True, "crop_size": 48}, "do_center_crop: true is not supported"),
    (IMAGES, lambda c: {**c, "do_pad": True}, "do_pad: true is not supported"),
    (IMAGES, lambda c: {**c, "image_processor_type": "ViTImageProcessor"}, "image_processor_type ViTImageProcessor"),
    (IMAGES, lambda c: {**c, "image_processor_type": "Siglip2ImageProcessor"}, "_type Siglip2ImageProcessor prepares"),
    (
        IMAGES,
        lambda c: {**{k: v for k, v in c.items() if "type" not in k}, "feature_extractor_type": "ViTFeatureExtractor"},
        "feature_extractor_type ViTFeatureExtractor prepares",
    ),
    (TOKENIZER, lambda c: {**c, "fast_tokenizer_files": ["tokenizer.4.0.json"]}, "fast_tokenizer_files names other"),
    (IMAGES, lambda c: {**c, "do_normalize": False}, "do_normalize: false is not supported"),
    (IMAGES, lambda c: {**c, "rescale_factor": 1.0}, "rescale_factor: expected 1/255"),
    (IMAGES, lambda c: [c], "preprocessor_config.json is not a JSON object"),
    (MODEL, lambda c: "siglip", "config.json is not a JSON object"),
    (MODEL, lambda c: {**c, "vision_config": {**c["vision_config"], "hidden_size": None}}, "vision_config.hidden_size"),
    (MODEL, lambda c: {**c, "vision_config": [1]}, r"config\.json: vision_config: "),
    (
        MODEL,
        lambda c: {**c, "text_config": {**c["text_config"], "projection_size": 9}},
        "text embeddings have 9 numbers",
    ),
    (
        MODEL,
        lambda c: {**c, "text_config": {**c["text_config"], "hidden_act": "relu"}},
        "text_config.hidden_act: .*relu",
    ),
    (MODEL, lambda c: {**c, "vision_config": {"vision_use_head": False}}, "vision_config.vision_use_head: .*False"),
    (MODEL, lambda c: {**c, "vision_config": {"num_channels": 1}}, "vision_config.num_channels: .*1"),
    (MODEL, lambda c: {**c, "vision_config": {"num_attention_heads": 5}}, "5 heads cannot share a hidden_size of 768"),
    (MODEL, lambda c: {**c, "model_type": "siglip2"}, "SiglipImageProcessor is not .* NaFlex models"),
    (MODEL, lambda c: {**c, "model_type": "clip"}, "is a model of type clip, not siglip"),
    (MODEL, lambda c: {}, "is a model of type unknown"),
    (TOKENIZER, lambda c: {**c, "tokenizer_class": "CLIPTokenizer"}, "tokenizer_class CLIPTokenizer: expected"),
    (
        TOKENIZER,
        lambda c: {**c, "tokenizer_class": "GemmaTokenizer"},
        "tokenizer_class GemmaTokenizer: .*tokenizer.json",
    ),
]


@pytest.mark.parametrize(
    ("name", "change", "message"), INVALID_SETTINGS, ids=[f"{n}-{message}" for n, _, message in INVALID_SETTINGS]
)
def test_invalid_settings_are_refused_before_the_weights_are_read(
    tmp_path: Path, name: str, change: Any, message: str
) -> None:
    source = copy_tiny(tmp_path / "model", **{name: change})
    with pytest.raises(CheckpointError, match=message) as refused:
        pin_model(ModelConfig(source=source))
    assert source in str(refused.value)
    assert "\n" not in str(refused.value)


def test_two_files_of_settings_that_differ_are_refused(tmp_path: Path) -> None:
    """transformers 5 reads the nested settings, and 4 the others: whoever edits one of them must not wonder."""
    directory = Path(copy_tiny(tmp_path / "model"))
    images = json.loads((directory / "preprocessor_config.json").read_text())
    nested = {**images, "image_processor_type": "SiglipImageProcessorFast"}
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    pin_model(ModelConfig(source=str(directory)))
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": {**nested, "resample": 2}}))
    with pytest.raises(CheckpointError, match=r"resample is 2 in processor_config\.json and 3 in preprocessor_config"):
        pin_model(ModelConfig(source=str(directory)))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_the_error_of_a_missing_or_invalid_settings_file_names_the_file(tmp_path: Path, name: str) -> None:
    source = copy_tiny(tmp_path / "model")
    path = Path(source) / name
    path.write_text("{")
    with pytest.raises(CheckpointError, match=f"cannot read {name}: "):
        pin_model(ModelConfig(source=source))
    path.unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        pin_model(ModelConfig(source=source))


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "nowhere"])
def test_a_source_that_does_not_exist_is_refused(source: str) -> None:
    with pytest.raises(CheckpointError, match="not a directory, an s3://, gs:// or az:// prefix, or a hub id"):
        pin_model(ModelConfig(source=source))


def test_an_unreachable_hub_gives_an_error_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="could not be fetched from the hub") as refused:
        pin_model(ModelConfig(source="google/siglip-base-patch16-256"))
    assert "\n" not in str(refused.value)


def test_damaged_files_give_an_error_of_one_line(tmp_path: Path) -> None:
    source = copy_tiny(tmp_path / "weights")
    weights = Path(source) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.source: ") as refused:
        load(source)
    assert "\n" not in str(refused.value)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(source)
    source = copy_tiny(tmp_path / "tokenizer")
    (Path(source) / "spiece.model").write_bytes(b"no sentences")
    with pytest.raises(CheckpointError, match=r"model\.source: ") as refused:
        load(source)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "added_tokens.json"])
def test_links_to_nothing_and_folders_are_refused_by_name(tmp_path: Path, name: str) -> None:
    path = Path(copy_tiny(tmp_path / "model")) / name
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=f"{name} is a folder or a link to nothing"):
        pin_model(ModelConfig(source=str(path.parent)))
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=f"{name} is a folder or a link to nothing"):
        pin_model(ModelConfig(source=str(path.parent)))


def test_json_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    source = copy_tiny(tmp_path / "model")
    (Path(source) / "config.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match=r"cannot read config\.json"):
        pin_model(ModelConfig(source=source))


def write_shards(directory: Path, *names: str, weight_map: Any = None, twice: bool = False) -> str:
    """The tiny checkpoint in two shards of these names, and its index."""
    source = Path(copy_tiny(directory))
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    order = sorted(weights)
    first, second = ({name: weights[name] for name in order[part::2]} for part in (0, 1))
    if twice:
        second[order[0]] = weights[order[0]] * 2
    for name, shard in zip(names, (first, second), strict=True):
        (source / name).parent.mkdir(exist_ok=True)
        save_file(shard, source / name, metadata={"format": "pt"})
    named = {name: names[number % 2] for number, name in enumerate(order)}
    index = {"weight_map": named if weight_map is None else weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(source)


@pytest.mark.parametrize("name", ["../b.safetensors", "sub/b.safetensors", "b.bin"])
def test_a_shard_that_is_no_part_of_the_checkpoints_identity_is_refused(tmp_path: Path, name: str) -> None:
    """It could change between two runs, which would then write to the same output."""
    source = write_shards(tmp_path / "model", "a.safetensors", name)
    with pytest.raises(CheckpointError, match=rf"index\.json names {re.escape(name)}: put all shards beside it"):
        pin_model(ModelConfig(source=source))


@pytest.mark.parametrize("weight_map", [[], {}, ["a.safetensors"]])
def test_an_index_without_shards_is_refused(tmp_path: Path, weight_map: Any) -> None:
    source = write_shards(tmp_path / "model", "a.safetensors", "b.safetensors", weight_map=weight_map)
    with pytest.raises(CheckpointError, match=r"index\.json names no shards"):
        pin_model(ModelConfig(source=source))


def test_a_weight_that_is_in_two_shards_is_refused(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "model", "a.safetensors", "b.safetensors", twice=True)
    with pytest.raises(CheckpointError, match=r"in more than one file: logit_bias\)"):
        load(source)


@pytest.mark.parametrize("factor", [0.0, 1e30])
def test_embeddings_that_are_no_unit_vectors_are_refused(tmp_path: Path, factor: float) -> None:
    """Weights of 0 give embeddings of 0, and large ones a norm that is infinite, so that the embedding is 0, too."""

    def change(weights: Weights) -> Weights:
        last = ("vision_model.head.mlp.fc2.", "vision_model.head.attention.out_proj.")
        return {name: value * factor if name.startswith(last) else value for name, value in weights.items()}

    source = copy_tiny(tmp_path / "model", change)
    with pytest.raises(CheckpointError, match="embeddings of images are not finite or 0"):
        load(source).warm_up()
    with pytest.raises(CheckpointError, match="embeddings of images are not finite or 0"):
        Encoder(pin_model(ModelConfig(source=source, dtype="bfloat16", compile=False)))


def test_a_tokenizer_that_draws_tokens_at_random_is_refused(tmp_path: Path) -> None:
    sampling = {"enable_sampling": True, "alpha": 0.1, "nbest_size": -1}
    source = copy_tiny(tmp_path / "model", tokenizer_config=lambda c: {**c, "sp_model_kwargs": sampling})
    with pytest.raises(CheckpointError, match=r"its tokenizer: .*enable_sampling gives a text other tokens each time"):
        load(source)


def test_weights_that_change_after_pinning_are_refused(tmp_path: Path) -> None:
    source = copy_tiny(tmp_path / "model")
    pinned = pin_model(ModelConfig(source=source))
    assert pinned.fetch() == Path(source)
    save_file(load_file(Path(source) / "model.safetensors"), Path(source) / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"another checkpoint here .* than the one with which the run started"):
        Encoder(pinned)


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "tokenizer_config.json", "spiece.model", "added_tokens.json"]
)
def test_the_identity_covers_every_file_that_changes_results(tmp_path: Path, name: str) -> None:
    config = ModelConfig(source=copy_tiny(tmp_path / "model"))
    before = pin_model(config).identity
    assert before == pin_model(ModelConfig(source=copy_tiny(tmp_path / "copy"))).identity
    with (Path(config.source) / name).open("ab") as file:
        file.write(b"{}" if name == "added_tokens.json" else b" ")
    assert pin_model(config).identity != before


def test_harmless_variants_of_checkpoints_are_loaded(tmp_path: Path) -> None:
    """The variants: position ids that older transformers saved, half precision, sharded weights, the nested processor
    settings of transformers 5, and no tokenizer_config.json."""
    ids = torch.arange(16)[None]
    old = copy_tiny(tmp_path / "old", lambda w: {**w, "vision_model.embeddings.position_ids": ids})
    (Path(old) / "tokenizer_config.json").unlink()
    (Path(old) / "pytorch_model.bin").write_bytes(b"never read")
    images = json.loads((Path(old) / "preprocessor_config.json").read_text())
    (Path(old) / "preprocessor_config.json").unlink()
    nested = {"processor_class": "SiglipProcessor", "image_processor": {**images, "resample": 2}}
    (Path(old) / "processor_config.json").write_text(json.dumps(nested))
    tiny, encoder = load("tiny"), load(old)
    assert encoder.spec == tiny.spec.model_copy(update={"resample": 2})
    assert encoder.tokenize(["a red circle"]).tolist() == tiny.tokenize(["a red circle"]).tolist()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    np.testing.assert_array_equal(encoder.embed_images(pixels), tiny.embed_images(pixels))
    half = copy_tiny(tmp_path / "half", lambda w: {n: v.bfloat16() for n, v in w.items()})
    assert (load(half).embed_images(pixels) * tiny.embed_images(pixels)).sum(axis=1).min() > 0.999
    shards = Path(copy_tiny(tmp_path / "shards"))
    (shards / "model.safetensors").unlink()
    SiglipModel.from_pretrained(TINY).save_pretrained(shards, max_shard_size="2MB")
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    np.testing.assert_array_equal(load(str(shards)).embed_images(pixels), tiny.embed_images(pixels))
    next(shards.glob("model-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"model\.source: ") as refused:
        load(str(shards))
    assert "\n" not in str(refused.value)
