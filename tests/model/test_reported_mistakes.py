"""What went wrong elsewhere when people loaded SigLIP, and the right value here. Each test names the public report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from siglip.checkpoint import pin_model
from siglip.checkpoints.files import TINY, CheckpointError, write_json
from siglip.config import Limits, ModelConfig
from siglip.encoder import Encoder
from siglip.images.decode import decode_image
from siglip.scoring import score_pairs, sigmoid
from tests.support.checkpoints import make_siglip, make_siglip2
from tests.support.images import encode, make_rgb
from tests.support.published import Published, make_published


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family, one with 16 tokens, and one with a projection."""
    folder = tmp_path_factory.mktemp("sources")
    siglip, siglip2 = make_siglip(folder / "siglip"), make_siglip2(folder / "siglip2")
    short = Published("google/siglip-so400m-patch14-224", "so400m", 14, 224, length=16)
    giant = Published("google/siglip2-giant-opt-patch16-256", "giant-opt", 16, 256, 256000, text="so400m")
    return {
        "siglip": siglip,
        "siglip2": siglip2,
        "short": make_published(short, folder / "short", siglip),
        "giant": make_published(giant, folder / "giant", siglip2),
    }


def load(source: Path | str) -> Encoder:
    return Encoder(pin_model(ModelConfig(source=str(source), dtype="float32", compile=False)))


def changed(source: Path, directory: Path, name: str, **values: Any) -> Path:
    """A copy of a checkpoint with other values in one of its JSON files."""
    shutil.copytree(source, directory)
    write_json(directory / name, {**json.loads((directory / name).read_text()), **values})
    return directory


def test_texts_of_so400m_at_224_have_16_tokens_and_not_64(sources: dict[str, Path], tmp_path: Path) -> None:
    """open_clip#1001 and transformers#32938: 16 positions, where all other checkpoints have 64. The tokenizer's own
    setting does not matter, which some copies of the checkpoint have as 64."""
    encoder = load(changed(sources["short"], tmp_path / "model", "tokenizer_config.json", model_max_length=64))
    assert encoder.text_length == 16
    assert encoder.tokenize(["a cat", "a very long text " * 9]).shape == (2, 16)


def test_the_giants_embeddings_are_as_wide_as_its_image_tower(sources: dict[str, Path], tmp_path: Path) -> None:
    """The text tower of siglip2-giant-opt is so400m's, 1152 wide, and is projected to 1536 (transformers' conversion
    script). A config.json that lacks the projection is refused before the weights are read."""
    encoder = load(sources["giant"])
    assert encoder.embed_texts(["a cat"]).shape == (1, encoder.width) == (1, 1536 // 8)
    source = tmp_path / "model"
    shutil.copytree(sources["giant"], source)
    config = json.loads((source / "config.json").read_text())
    assert config["text_config"].pop("projection_size") == 192
    write_json(source / "config.json", config)
    with pytest.raises(CheckpointError, match=r"text embeddings have 144 numbers .* image embeddings have 192"):
        pin_model(ModelConfig(source=str(source)))


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_capital_letters_do_not_change_what_is_found(family: str, sources: dict[str, Path]) -> None:
    """immich#11865: with a capital letter in a query the results were unrelated."""
    ids = load(sources[family]).tokenize(["a photo of a cat", "A Photo of a CAT"])
    np.testing.assert_array_equal(ids[0], ids[1])


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_a_text_has_the_same_embedding_alone_and_beside_a_long_one(family: str, sources: dict[str, Path]) -> None:
    """mteb#1424 and transformers#28569: texts that were padded to the longest of a batch lost most of the accuracy."""
    encoder = load(sources[family])
    alone = encoder.embed_texts(["a cat"])
    beside = encoder.embed_texts(["a cat", "a very long text " * 40])
    assert encoder.tokenize(["a cat"]).shape == (1, 64)
    np.testing.assert_allclose(alone[0], beside[0], atol=1e-6)


def test_gemmas_tokenizer_is_not_read_as_siglips(sources: dict[str, Path], tmp_path: Path) -> None:
    """transformers#36470: SigLIP 2's tokenizer was loaded by SigLIP's class, with a warning about the tokens."""
    source = changed(sources["siglip2"], tmp_path / "model", "tokenizer_config.json", tokenizer_class="SiglipTokenizer")
    with pytest.raises(CheckpointError, match=r"tokenizer_class SiglipTokenizer: expected .*GemmaTokenizer with tok"):
        pin_model(ModelConfig(source=str(source)))


def test_positions_are_not_interpolated_to_the_size_that_there_is(sources: dict[str, Path]) -> None:
    """transformers#33993: at a checkpoint's own 384 pixels, `interpolate_pos_encoding` failed."""
    for source, own in (("siglip", 256), ("short", 224)):
        config = ModelConfig(source=str(sources[source]), image_size=own, dtype="float32", compile=False)
        given, plain = Encoder(pin_model(config)), load(sources[source])
        pixels = np.random.default_rng(0).integers(0, 256, (1, own, own, 3), np.uint8)
        np.testing.assert_array_equal(given.embed_images(pixels), plain.embed_images(pixels))


def test_mean_and_deviation_are_the_checkpoints_own(sources: dict[str, Path], tmp_path: Path) -> None:
    """transformers#38318: 0.5 and ImageNet's values were mixed up. They are read, and not assumed."""
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    source = changed(sources["siglip"], tmp_path / "model", "preprocessor_config.json", image_mean=mean, image_std=std)
    encoder = load(source)
    pixels = decode_image(encode(make_rgb(90, 300, 1)), encoder.spec, Limits()).pixels
    model = AutoModel.from_pretrained(source).eval()
    with torch.inference_mode():
        scaled = (torch.from_numpy(pixels / 255) - torch.tensor(mean)) / torch.tensor(std)
        theirs = model.get_image_features(pixel_values=scaled.permute(2, 0, 1)[None].float()).pooler_output
    theirs = torch.nn.functional.normalize(theirs, dim=-1).numpy()
    assert (encoder.embed_images(pixels[None]) * theirs).sum() >= 0.99999
    assert (load(sources["siglip"]).embed_images(pixels[None]) * theirs).sum() < 0.999


def test_scores_are_sigmoids_of_the_scaled_cosine_with_the_bias() -> None:
    """open_clip#716 and #746: the scale is stored as its logarithm, scores are independent of each other and low."""
    encoder, weights = load(TINY), load_file(TINY / "model.safetensors")
    assert encoder.scale.logit_scale == pytest.approx(float(weights["logit_scale"].exp()))
    assert encoder.scale.logit_bias == pytest.approx(float(weights["logit_bias"]))
    pixels = decode_image(encode(make_rgb(90, 300, 1)), encoder.spec, Limits()).pixels[None]
    images, texts = encoder.embed_images(pixels), encoder.embed_texts(["a red circle", "a dog"])
    both = sigmoid(score_pairs(images, texts, encoder.scale))
    one = sigmoid(score_pairs(images, texts[:1], encoder.scale))
    expected = 1 / (
        1 + np.exp(-(float(weights["logit_scale"].exp()) * images @ texts.T + float(weights["logit_bias"])))
    )
    np.testing.assert_allclose(both, expected, rtol=1e-4)
    assert both[0, 0] == pytest.approx(one[0, 0], rel=1e-5)


@pytest.mark.parametrize("missing", ["logit_bias", "logit_scale"])
def test_a_model_without_a_bias_of_its_logits_is_refused(missing: str, tmp_path: Path) -> None:
    """open_clip#736: a CLIP has no such bias, and its scores mean something else."""
    shutil.copytree(TINY, tmp_path / "model")
    weights = load_file(TINY / "model.safetensors")
    del weights[missing]
    save_file(weights, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"\(missing: {missing}\)"):
        load(tmp_path / "model")


@pytest.mark.parametrize(("image", "patch"), [(384, 16), (256, 14), (224, 16)])
def test_settings_of_another_size_than_the_weights_are_refused(
    image: int, patch: int, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Kwai-YuanQi/MM-RLHF#5: a size mismatch with the settings of another checkpoint. `model.image_size` is the way."""
    source = tmp_path / "model"
    shutil.copytree(sources["siglip"], source)
    config = json.loads((source / "config.json").read_text())
    config["vision_config"].update(image_size=image, patch_size=patch)
    write_json(source / "config.json", config)
    images = json.loads((source / "preprocessor_config.json").read_text())
    write_json(source / "preprocessor_config.json", {**images, "size": {"height": image, "width": image}})
    with pytest.raises(CheckpointError, match=r"of another shape: vision_model\.embeddings\.p"):
        load(source)


def test_the_text_heads_bias_is_a_part_of_the_embedding(sources: dict[str, Path], tmp_path: Path) -> None:
    """so400m-patch16-256-i18n has no head: its conversion wrote an identity (transformers#32938). All others have one
    with a bias, which is not to be lost."""
    shutil.copytree(sources["siglip"], tmp_path / "model")
    weights = load_file(sources["siglip"] / "model.safetensors")
    shift = torch.linspace(-1, 1, len(weights["text_model.head.bias"]))
    weights["text_model.head.bias"] = weights["text_model.head.bias"] + shift
    save_file(weights, tmp_path / "model" / "model.safetensors")
    encoder = load(tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    with torch.inference_mode():
        theirs = model.get_text_features(input_ids=torch.from_numpy(encoder.tokenize(["a cat"]))).pooler_output
    theirs = torch.nn.functional.normalize(theirs, dim=-1).numpy()
    assert (encoder.embed_texts(["a cat"]) * theirs).sum() >= 0.99999
    assert (load(sources["siglip"]).embed_texts(["a cat"]) * theirs).sum() < 0.99


def test_an_index_that_names_a_shard_that_is_not_there_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    """A download that stopped early, in shards."""
    source = tmp_path / "model"
    shutil.copytree(sources["siglip2"], source)
    AutoModel.from_pretrained(source).save_pretrained(source, max_shard_size="200KB")
    (source / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) > 1
    load(source)
    shards[-1].unlink()
    with pytest.raises(CheckpointError, match=rf"model\.source: .*{shards[-1].name}") as refused:
        load(source)
    assert "\n" not in str(refused.value)
