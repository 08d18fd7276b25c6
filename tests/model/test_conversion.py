"""`sightline model convert`: checkpoints of open_clip and pickled weights, in the layout that is loaded.

The reference for open_clip is what open_clip itself computed: see `tests/support/open_clip.py`.
"""

from __future__ import annotations

import fnmatch
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModel, T5Tokenizer
from typer.testing import CliRunner, Result

from sightline.cli import app
from siglip.checkpoint import pin_model
from siglip.checkpoints import conversion
from siglip.checkpoints.files import TINY, CheckpointError, write_json
from siglip.config import ModelConfig
from siglip.encoder import Encoder
from tests.support.checkpoints import make_siglip, make_siglip2
from tests.support.open_clip import CONFIGS, draw_inputs, make_open_clip, make_settings, make_weights, read_embeddings


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with a small tokenizer, by family."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {"siglip": make_siglip(folder / "siglip"), "siglip2": make_siglip2(folder / "siglip2")}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["model", "convert", *map(str, arguments)], env={"COLUMNS": "200"})


def load(directory: Path) -> Encoder:
    return Encoder(pin_model(ModelConfig(source=str(directory), dtype="float32", compile=False)))


def check_equal(found: np.ndarray, expected: np.ndarray) -> None:
    """Embeddings of unit norm, (N, D), are equal: with the other GELU a number is off by 2e-5 and more."""
    np.testing.assert_allclose(found, expected, atol=5e-6)
    assert (found * expected).sum(axis=1).min() >= 0.99999


@pytest.mark.parametrize("name", CONFIGS)
def test_a_converted_checkpoint_has_the_embeddings_of_open_clip(
    name: str, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    """Sightline's images, and the images and texts of transformers' model, are those of open_clip."""
    family = "siglip2" if "SigLIP2" in name else "siglip"
    source = make_open_clip(name, tmp_path / "source", tokenizers[family])
    result = run(source, tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert "open_clip_model.safetensors (safetensors)" in result.stderr
    encoder = load(tmp_path / "model")
    assert encoder.text_length == CONFIGS[name][3]
    assert encoder.scale.logit_bias == pytest.approx(-12.9)
    assert np.log(encoder.scale.logit_scale) == pytest.approx(4.7)
    pixels, ids = draw_inputs(name)
    images, texts = read_embeddings(name)
    check_equal(encoder.embed_images(pixels), images)
    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    with torch.inference_mode():
        scaled = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
        theirs = model(input_ids=torch.from_numpy(ids), pixel_values=scaled)
        prompt = model.get_text_features(input_ids=torch.from_numpy(encoder.tokenize(["a photo of a cat"])))
    check_equal(theirs.image_embeds.numpy(), images)
    check_equal(theirs.text_embeds.numpy(), texts)
    check_equal(encoder.embed_texts(["a photo of a cat"]), functional.normalize(prompt.pooler_output).numpy())


def test_the_activation_is_the_one_that_open_clip_computes_with(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """Google's checkpoints have GELU by tanh everywhere. With it, open_clip's numbers would be missed."""
    name = "ViT-B-16-SigLIP"
    make_open_clip(name, tmp_path / "source", tokenizers["siglip"])
    assert run(tmp_path / "source", tmp_path / "model").exit_code == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["text_config"]["hidden_act"] == config["vision_config"]["hidden_act"] == "gelu"
    for tower in ("text_config", "vision_config"):
        config[tower]["hidden_act"] = "gelu_pytorch_tanh"
    write_json(tmp_path / "model" / "config.json", config)
    with pytest.raises(AssertionError):
        check_equal(load(tmp_path / "model").embed_images(draw_inputs(name)[0]), read_embeddings(name)[0])


def as_pickle(weights: dict[str, torch.Tensor], path: Path) -> None:
    torch.save({f"module.{name}": tensor for name, tensor in weights.items()}, path)


def as_training_state(weights: dict[str, torch.Tensor], path: Path) -> None:
    torch.save({"epoch": 3, "name": "run", "state_dict": weights}, path)


def as_half(weights: dict[str, torch.Tensor], path: Path) -> None:
    torch.save({name: tensor.half() for name, tensor in weights.items()}, path)


@pytest.mark.parametrize(("write", "error"), [(as_pickle, 5e-6), (as_training_state, 5e-6), (as_half, 1e-2)])
def test_tensors_are_read_from_a_pickle(
    write: Callable[[dict[str, torch.Tensor], Path], None], error: float, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    name = "ViT-B-16-SigLIP"
    source = make_open_clip(name, tmp_path / "source", tokenizers["siglip"])
    (source / "open_clip_model.safetensors").unlink()
    write(make_weights(name), source / "open_clip_pytorch_model.bin")
    result = run(source, tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert "open_clip_pytorch_model.bin (a pickle, of which only tensors were read)" in result.stderr
    found = load(tmp_path / "model").embed_images(draw_inputs(name)[0])
    np.testing.assert_allclose(found, read_embeddings(name)[0], atol=error)


class Harmful:
    """What a pickle can do: call a function when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    source = make_open_clip("ViT-B-16-SigLIP", tmp_path / "source", tokenizers["siglip"])
    (source / "open_clip_model.safetensors").unlink()
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        write({"logit_scale": Harmful(tmp_path / "harmed")}, source / "open_clip_pytorch_model.bin")
        result = run(source, tmp_path / "model")
        assert result.exit_code == 2
        assert "is not a plain file of tensors" in result.stderr
        assert not (tmp_path / "harmed").exists()
        assert not (tmp_path / "model").exists()
        assert not list(tmp_path.glob(".converting-*"))


def test_a_checkpoint_with_pickled_weights_in_shards_is_converted(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(TINY, source)
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, some in shards.items():
        torch.save({name: weights[name] for name in some}, source / file)
    write_json(
        source / "pytorch_model.bin.index.json",
        {"metadata": {}, "weight_map": {name: file for file, some in shards.items() for name in some}},
    )
    with pytest.raises(CheckpointError, match=r"sightline model convert \S+/source DIRECTORY, and use the directory"):
        pin_model(ModelConfig(source=str(source)))
    result = run(source, tmp_path / "model")
    assert result.exit_code == 0, result.output
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    np.testing.assert_array_equal(load(tmp_path / "model").embed_images(pixels), load(TINY).embed_images(pixels))


def test_t5s_tokenizer_is_replaced_by_the_same_vocabulary_for_siglip(
    tokenizers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm's repositories have SigLIP's vocabulary as T5's tokenizer.json. Google's checkpoint with it is on the hub;
    the hub is a directory here."""
    source = make_open_clip("ViT-B-16-SigLIP", tmp_path / "source", None)
    T5Tokenizer.from_pretrained(str(tokenizers["siglip"]), extra_ids=0).save_pretrained(source)
    assert not (source / "spiece.model").exists()
    refused = run(source, tmp_path / "model")
    assert refused.exit_code == 2
    assert "its tokenizer is timm/ViT-B-16-SigLIP" in refused.stderr
    assert "--tokenizer" in refused.stderr
    monkeypatch.setitem(conversion._VOCABULARIES, 512, "google/siglip-base-patch16-224")
    fetched: list[str] = []

    def fetch(name: str, revision: str | None, patterns: Any) -> Path:
        fetched.append(name)
        return tokenizers["siglip"]

    monkeypatch.setattr(conversion, "fetch_hub", fetch)
    monkeypatch.setattr(conversion, "list_hub", lambda *_: frozenset())
    result = run(source, tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert "tokenizer: from google/siglip-base-patch16-224" in result.stderr
    assert set(fetched) == {"google/siglip-base-patch16-224"}
    given = run(source, tmp_path / "given", "--tokenizer", tokenizers["siglip"])
    assert given.exit_code == 0, given.output
    assert f"tokenizer: from {tokenizers['siglip']}" in given.stderr


@pytest.mark.parametrize(("name", "source"), [("tiny", "./tiny"), ("~mine", "/.*/~mine")])
def test_a_directory_with_the_name_of_something_else(
    name: str, source: str, tokenizers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`model.source: tiny` is the checkpoint that ships, and not the one that was written to this directory."""
    monkeypatch.chdir(tmp_path)
    make_open_clip("ViT-B-16-SigLIP", tmp_path / "source", tokenizers["siglip"])
    result = run("source", name)
    assert result.exit_code == 0, result.output
    found = re.search("model.source: (.*)", result.stdout)
    assert found is not None
    assert re.fullmatch(source, found[1])
    identity = pin_model(ModelConfig(source=found[1])).identity
    assert identity in result.stdout
    assert identity != pin_model(ModelConfig(source="tiny")).identity


def test_another_tokenizer_than_the_sources_own_is_refused(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    source = make_open_clip("ViT-B-16-SigLIP", tmp_path / "source", None)
    T5Tokenizer.from_pretrained(str(tokenizers["siglip"]), extra_ids=0).save_pretrained(source)
    for other in (TINY, tokenizers["siglip2"]):
        result = run(source, tmp_path / "model", "--tokenizer", other)
        assert result.exit_code == 2
        assert "has other tokens with the tokenizer of" in result.stderr


def test_the_text_rule_of_open_clip_is_named_where_it_is_another(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    for name, family, says in (("ViT-B-16-SigLIP", "siglip", False), ("ViT-B-16-SigLIP2-256", "siglip2", True)):
        source = make_open_clip(name, tmp_path / f"{family}-source", tokenizers[family])
        result = run(source, tmp_path / family)
        assert result.exit_code == 0, result.output
        assert ("set model.text_rule: canonicalize for open_clip's numbers" in result.stderr) is says


def change(**model: Any) -> Callable[[dict[str, Any]], None]:
    """A change of `model_cfg`, of which None removes a key, and a dict changes a part."""

    def apply(settings: dict[str, Any]) -> None:
        for key, value in model.items():
            if isinstance(value, dict):
                settings["model_cfg"][key].update(value)
            elif value is None:
                del settings["model_cfg"][key]
            else:
                settings["model_cfg"][key] = value

    return apply


REFUSED: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("a CLIP", change(init_logit_bias=None), "it is a CLIP and not a SigLIP"),
    ("an NLLB text tower", change(text_cfg={"hf_model_name": "facebook/nllb-200"}), "text tower is facebook/nllb-200"),
    ("another trunk", change(vision_cfg={"timm_model_name": "convnext_base"}), "vision_cfg.timm_model_name: "),
    (
        "NaFlex",
        change(vision_cfg={"timm_model_name": "naflexvit_base_patch16_siglip"}),
        "which is not converted: use google/siglip2-base-patch16-naflex",
    ),
    ("average pooling", change(vision_cfg={"timm_pool": "avg"}), "vision_cfg.timm_pool: "),
    ("a projection", change(vision_cfg={"timm_proj": "linear"}), "vision_cfg.timm_proj: "),
    ("a mask", change(text_cfg={"no_causal_mask": False}), "text_cfg.no_causal_mask: "),
    ("another pooling of texts", change(text_cfg={"pool_type": "argmax"}), "text_cfg.pool_type: "),
    ("a key that is not known", change(text_cfg={"qk_norm": True}), "text_cfg.qk_norm: "),
    ("QuickGELU", change(quick_gelu=True), "quick_gelu: "),
    ("a cut", lambda c: c["preprocess_cfg"].update(resize_mode="shortest"), "preprocess_cfg.resize_mode: "),
    ("no resize mode", lambda c: c["preprocess_cfg"].pop("resize_mode"), "preprocess_cfg.resize_mode: Field required"),
    ("another filter", lambda c: c["preprocess_cfg"].update(interpolation="random"), "preprocess_cfg.interpolation: "),
    ("no model", lambda c: c.pop("model_cfg"), "model_cfg: Field required"),
    ("more positions", change(text_cfg={"context_length": 32}), "of another shape: text_model.embeddings.position"),
]


@pytest.mark.parametrize(("alter", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_settings_that_are_no_siglips_are_refused(
    alter: Callable[[dict[str, Any]], None], message: str, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    source = make_open_clip("ViT-B-16-SigLIP", tmp_path / "source", tokenizers["siglip"])
    settings = make_settings("ViT-B-16-SigLIP")
    alter(settings)
    write_json(source / "open_clip_config.json", settings)
    result = run(source, tmp_path / "model")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "model").exists()


def test_weights_that_are_no_siglips_are_refused(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    source = make_open_clip("ViT-B-16-SigLIP", tmp_path / "source", tokenizers["siglip"])
    weights = make_weights("ViT-B-16-SigLIP")
    nan = weights["text.ln_final.bias"] * float("nan")
    for changed, message in (
        ({**weights, "visual.trunk.cls_token": torch.zeros(1, 1, 96)}, "have visual.trunk.cls_token, which no SigLIP"),
        (
            {name: one for name, one in weights.items() if "attn_pool.kv" not in name},
            "have no visual.trunk.attn_pool.kv",
        ),
        ({name: one for name, one in weights.items() if name != "logit_bias"}, "missing: logit_bias"),
        (
            {name: one for name, one in weights.items() if "blocks.1." not in name},
            "missing: text_model.encoder.layers.1",
        ),
        ({**weights, "text.ln_final.bias": nan}, "not finite: text_model.final_layer_norm.bias"),
        # Without this refusal the text tower's output would silently be taken as it is.
        ({name: one for name, one in weights.items() if "projection" not in name}, "have no text.text_projection"),
        ({name: one for name, one in weights.items() if "resblocks.0.mlp" not in name}, "have no text_model.encoder"),
        ({**weights, "logit_scale": torch.zeros(2)}, "not the shapes of a SigLIP"),
        ({**weights, "visual.trunk.pos_embed": torch.zeros(())}, "not the shapes of a SigLIP"),
        ({**weights, "visual.trunk.blocks.0.attn.qkv.weight": torch.zeros(4, 4)}, "not the shapes of a SigLIP"),
        (
            {**weights, "visual.trunk.patch_embed.proj.weight": torch.zeros(96, 3, 32, 32)},
            "patches are (96, 3, 32, 32)",
        ),
    ):
        save_file(changed, source / "open_clip_model.safetensors")
        result = run(source, tmp_path / "model")
        assert result.exit_code == 2, result.output
        assert message in result.stderr
        assert not (tmp_path / "model").exists()
    (source / "open_clip_model.safetensors").write_bytes(b"garbage" * 9)
    result = run(source, tmp_path / "model")
    assert result.exit_code == 2, result.output
    assert "open_clip_model.safetensors cannot be read" in result.stderr


def test_a_projection_that_the_settings_do_not_have_is_refused(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    source = make_open_clip("ViT-B-16-SigLIP", tmp_path / "source", tokenizers["siglip"])
    settings = make_settings("ViT-B-16-SigLIP")
    settings["model_cfg"]["text_cfg"]["proj_type"] = "none"
    write_json(source / "open_clip_config.json", settings)
    result = run(source, tmp_path / "model")
    assert result.exit_code == 2, result.output
    assert "text.text_projection is there, and proj_type is none" in result.stderr


def test_a_tokenizer_of_another_size_is_named(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    source = make_open_clip("ViT-B-16-SigLIP", tmp_path / "source", tokenizers["siglip"])
    result = run(source, tmp_path / "model", "--tokenizer", TINY)
    assert result.exit_code == 0, result.output
    assert "it has 200 tokens, and the text tower 512" in " ".join(result.stderr.split())


def test_other_mistakes_are_refused(tmp_path: Path) -> None:
    for source, directory, message in (
        (TINY, tmp_path / "model", "there is nothing to convert: use it as model.source"),
        (tmp_path, tmp_path / "model", "has no config.json"),
        ("s3://bucket/model", tmp_path / "model", "s3://bucket/model is not a directory or a hub id"),
        (TINY, TINY, "is not empty: give a new directory"),
    ):
        result = run(source, directory)
        assert result.exit_code == 2
        assert message in result.stderr


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the hub: a request downloads the files that match into a snapshot, as the hub's client does."""
    folder = tmp_path / "hub"

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        snapshot = tmp_path / "snapshots" / name / "0123abc"
        snapshot.mkdir(parents=True, exist_ok=True)
        for path in (folder / name).iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(path, snapshot / path.name)
        return str(snapshot)

    def list_files(name: str, *, revision: str) -> list[str]:
        assert revision == "0123abc"
        return [path.name for path in (folder / name).iterdir()]

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", list_files)
    return folder


def test_a_repository_of_the_hub_is_converted(hub: Path, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    name = "ViT-B-16-SigLIP"
    source = make_open_clip(name, hub / "timm" / name, tokenizers["siglip"])
    (source / "open_clip_pytorch_model.bin").write_bytes(b"never read, because there are safetensors")
    line = rf"model\.source: timm/{name}: .* run sightline model convert timm/{name} DIRECTORY, and use the directory"
    with pytest.raises(CheckpointError, match=line):
        pin_model(ModelConfig(source=f"timm/{name}"))
    result = run(f"timm/{name}", tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert not list((tmp_path / "snapshots").rglob("*.bin"))
    check_equal(load(tmp_path / "model").embed_images(draw_inputs(name)[0]), read_embeddings(name)[0])


def test_weights_that_a_repository_of_the_hub_does_not_have_are_named(hub: Path, tokenizers: dict[str, Path]) -> None:
    """Only when weights are downloaded is it known which there are."""
    shutil.copytree(tokenizers["siglip"], hub / "someone" / "export")
    (hub / "someone" / "export" / "model.safetensors").unlink()
    pinned = pin_model(ModelConfig(source="someone/export", dtype="float32", compile=False))
    with pytest.raises(CheckpointError, match=r"no model\.safetensors: if it has pytorch_model\.bin, convert it with"):
        Encoder(pinned)
