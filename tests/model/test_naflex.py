"""NaFlex checkpoints, compared with transformers' processor and model, and what others have got wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModel, AutoProcessor
from transformers.models.siglip2 import modeling_siglip2
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from siglip.checkpoint import PinnedModel, pin_model
from siglip.checkpoints.files import CheckpointError
from siglip.checkpoints.open_clip import read_settings
from siglip.checkpoints.self_test import check_padding, draw_images
from siglip.config import Limits, ModelConfig
from siglip.encoder import Encoder
from siglip.images.decode import decode_image
from siglip.images.patches import read_grids
from siglip.scoring import Floats
from siglip.towers import transformer
from siglip.towers.naflex import NaFlexTower, weigh_neighbours
from tests.conftest import require
from tests.model.test_encoder import NO_COMPILER
from tests.support.checkpoints import TEXTS, make_naflex, make_siglip, make_siglip2
from tests.support.images import encode, make_rgb

SIZES = [
    (256, 256), (640, 480), (480, 640), (1920, 1080), (1080, 1920), (64, 1280), (1280, 64), (3000, 1), (1, 3000),
    (1, 1), (2, 2), (3, 3), (5, 7), (500, 3), (33, 31), (1000, 999), (16, 16), (2000, 1500), (2480, 3508),
]  # fmt: skip


def pin(directory: Path, **settings: Any) -> PinnedModel:
    return pin_model(ModelConfig(source=str(directory), **{"dtype": "float32", "compile": False, **settings}))


def decode(model: Encoder, *images: Image.Image) -> np.ndarray:
    return np.stack([decode_image(encode(image), model.spec, Limits()).pixels for image in images])


class Reference:
    """The checkpoint in transformers. Its own processor cuts the images; `patches` is its `max_num_patches`."""

    def __init__(self, directory: Path) -> None:
        self.images = Siglip2ImageProcessorPil.from_pretrained(directory)
        self.model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(directory)

    def embed(self, *images: Image.Image, **settings: Any) -> Floats:
        with torch.inference_mode():
            found = self.model.get_image_features(**self.images(list(images), return_tensors="pt", **settings))
        return np.asarray(functional.normalize(found.pooler_output, dim=-1).numpy())

    def embed_texts(self, texts: list[str]) -> Floats:
        ids = self.processor(text=texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            found = self.model.get_text_features(input_ids=ids["input_ids"])
        return np.asarray(functional.normalize(found.pooler_output, dim=-1).numpy())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_naflex(tmp_path_factory.mktemp("naflex") / "model")


@pytest.fixture(scope="module")
def ours(directory: Path) -> Encoder:
    return Encoder(pin(directory))


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Reference:
    return Reference(directory)


@pytest.fixture(autouse=True)
def correct_single_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give transformers a correct resize to one column.

    On a CPU torch 2.13 gives each row of a single column the first row, if it reads floats and antialiases; see the
    test below. One row is right, so a column is resized as a row.
    """
    resize = functional.interpolate

    def interpolate(table: torch.Tensor, size: tuple[int, int], **settings: Any) -> torch.Tensor:
        if size[1] != 1:
            return resize(table, size=size, **settings)
        turned = table.transpose(2, 3).contiguous()
        return resize(turned, size=size[::-1], **settings).transpose(2, 3)

    class Functional:
        def __getattr__(self, name: str) -> Any:
            return interpolate if name == "interpolate" else getattr(functional, name)

    monkeypatch.setattr(modeling_siglip2, "F", Functional())


def lowest(ours: Floats, theirs: Floats) -> float:
    return float((ours * theirs).sum(axis=1).min())


def test_images_of_every_shape_in_one_batch_have_the_embeddings_of_transformers(
    ours: Encoder, theirs: Reference
) -> None:
    images = [make_rgb(width, height, seed) for seed, (width, height) in enumerate(SIZES)]
    pixels = decode(ours, *images)
    expected = theirs.images(images, return_tensors="pt")
    np.testing.assert_array_equal(read_grids(pixels), expected["spatial_shapes"].numpy())
    assert lowest(ours.embed_images(pixels), theirs.embed(*images)) >= 0.99999


def test_texts_have_the_embeddings_of_transformers(ours: Encoder, theirs: Reference, directory: Path) -> None:
    canonical = [pin(directory).rule.canonicalize(text) for text in TEXTS]
    assert lowest(ours.embed_texts(TEXTS), theirs.embed_texts(canonical)) >= 0.99999


def test_an_embedding_does_not_depend_on_the_other_images_of_the_batch(ours: Encoder) -> None:
    pixels = decode(ours, *(make_rgb(width, height, seed) for seed, (width, height) in enumerate(SIZES)))
    together = ours.embed_images(pixels)
    alone = np.concatenate([ours.embed_images(one[None]) for one in pixels])
    backwards = ours.embed_images(pixels[::-1].copy())[::-1]
    np.testing.assert_allclose(alone, together, atol=1e-6)
    np.testing.assert_allclose(backwards, together, atol=1e-6)


def test_bfloat16_has_the_embeddings_of_float32(ours: Encoder, directory: Path) -> None:
    pixels = decode(ours, *(make_rgb(width, height, seed) for seed, (width, height) in enumerate(SIZES)))
    small = Encoder(pin(directory, dtype="bfloat16"))
    assert lowest(small.embed_images(pixels), ours.embed_images(pixels)) >= 0.999
    assert lowest(small.embed_texts(TEXTS), ours.embed_texts(TEXTS)) >= 0.999


@pytest.mark.slow
def test_a_compiled_model_has_the_same_embeddings(ours: Encoder, directory: Path) -> None:
    require("C++ compiler", NO_COMPILER)
    pixels = decode(ours, *(make_rgb(width, height, seed) for seed, (width, height) in enumerate(SIZES)))
    compiled = Encoder(pin(directory, compile=True, batch_size=8), texts=False, sizes=(1,))
    compiled.warm_up()
    assert lowest(compiled.embed_images(pixels), ours.embed_images(pixels)) >= 0.99999


@pytest.mark.parametrize("patches", [16, 100, 256, 1024])
def test_a_number_of_patches_gives_what_transformers_gives_with_it(
    ours: Encoder, theirs: Reference, directory: Path, patches: int
) -> None:
    pinned = pin(directory, patches=patches)
    chosen = Encoder(pinned, texts=False)
    images = [make_rgb(640, 480), make_rgb(90, 1200, 1), make_rgb(40, 30, 2)]
    pixels = decode(chosen, *images)
    assert pixels.shape == (3, patches + 1, 768)
    assert lowest(chosen.embed_images(pixels), theirs.embed(*images, max_num_patches=patches)) >= 0.99999
    own = pin(directory)
    assert (pinned.identity == own.identity) == (patches == 256)
    assert pinned.image_tokens == patches


@pytest.mark.parametrize(
    ("vision", "images"),
    [
        ({"hidden_size": 144, "intermediate_size": 538, "num_hidden_layers": 2, "num_attention_heads": 2}, {}),
        ({"num_patches": 49}, {"max_num_patches": 300}),
        ({"patch_size": 14}, {"resample": 3, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.25]}),
    ],
    ids=["so400m", "another table", "other preprocessing"],
)
def test_other_checkpoints_have_the_embeddings_of_transformers(
    tmp_path: Path, vision: dict[str, Any], images: dict[str, Any]
) -> None:
    directory = make_naflex(tmp_path / "model", vision, **images)
    ours, theirs = Encoder(pin(directory), texts=False), Reference(directory)
    pictures = [make_rgb(640, 480), make_rgb(90, 1200, 1), make_rgb(20, 30, 2)]
    assert lowest(ours.embed_images(decode(ours, *pictures)), theirs.embed(*pictures)) >= 0.99999


GRIDS = [(16, 16), (14, 18), (64, 4), (4, 64), (1, 256), (7, 7), (1, 1), (2, 100), (31, 33)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_position_embeddings_are_resized_like_torch_s_antialiased_bilinear_filter(grid: tuple[int, int]) -> None:
    """Others used a bicubic filter, or a bilinear one without antialiasing: a cosine of 0.9 for small grids."""
    table = torch.randn(16, 16, 8, generator=torch.Generator().manual_seed(0))
    down, across = (weigh_neighbours(torch.arange(n)[None], torch.tensor([[n]]), 16)[0] for n in grid)
    found = torch.einsum("ri,cj,ijd->drc", down, across, table)
    planes = table.permute(2, 0, 1)[None]
    expected = functional.interpolate(planes, size=grid, mode="bilinear", align_corners=False, antialias=True)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_single_column_has_a_position_in_each_row() -> None:
    """torch's CPU kernel gives all rows of one column the first row: then transformers sees no order in it."""
    down = weigh_neighbours(torch.arange(4)[None], torch.tensor([[4]]), 16)[0]
    rising = torch.arange(16.0)
    found = down @ rising
    assert (found.diff() > 3).all()
    planes = rising.view(1, 1, 1, 16).expand(1, 1, 16, 16).contiguous()
    row = functional.interpolate(planes, size=(1, 4), mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(found, row.flatten(), atol=1e-5, rtol=0)
    column = functional.interpolate(
        planes.transpose(2, 3).contiguous(), size=(4, 1), mode="bilinear", align_corners=False, antialias=True
    )
    assert (column.flatten().diff() == 0).all(), "torch has repaired it: the correction above is not needed any more"


@pytest.fixture
def unmasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that ignores its mask, as a kernel without masks does."""
    attend = functional.scaled_dot_product_attention

    class Functional:
        def __getattr__(self, name: str) -> Any:
            if name == "scaled_dot_product_attention":
                return lambda query, key, value, attn_mask=None: attend(query, key, value)
            return getattr(functional, name)

    monkeypatch.setattr(transformer, "functional", Functional())


def test_attention_that_ignores_its_mask_is_refused_on_load(directory: Path, unmasked: None) -> None:
    with pytest.raises(CheckpointError, match=r"self-test: .*attention ignores its mask") as refused:
        Encoder(pin(directory))
    assert "\n" not in str(refused.value)


def test_what_follows_the_last_patch_has_no_influence(ours: Encoder) -> None:
    pixels = decode(ours, make_rgb(640, 480), make_rgb(1, 1, 1))
    spoiled = pixels.copy()
    for image, count in zip(spoiled, read_grids(pixels).prod(axis=1), strict=True):
        image[count:-1] = 255
    np.testing.assert_array_equal(ours.embed_images(spoiled), ours.embed_images(pixels))
    images = torch.from_numpy(draw_images(ours.spec))
    assert isinstance(ours._vision, NaFlexTower)
    check_padding(ours._vision, *ours._input(images, torch.float32))


def test_a_grid_of_too_many_patches_is_refused(ours: Encoder) -> None:
    pixels = decode(ours, make_rgb(64, 64))
    pixels[0, -1, :4] = [15, 0, 16, 0]
    with pytest.raises(ValueError, match="more than 256 patches"):
        ours.embed_images(pixels)


def test_the_processor_s_own_number_of_patches_counts(tmp_path: Path) -> None:
    """A checkpoint that asks for 1,024 patches gets them: where `max_num_patches` was not read, it silently got 256."""
    directory = make_naflex(tmp_path / "model", max_num_patches=1024)
    assert pin(directory).spec.shape == (1025, 768)
    (directory / "preprocessor_config.json").rename(tmp_path / "images.json")
    nested = {"image_processor": json.loads((tmp_path / "images.json").read_text()), "processor_class": "x"}
    (directory / "processor_config.json").write_text(json.dumps(nested))
    assert pin(directory).spec.shape == (1025, 768)


def change_json(directory: Path, name: str, **values: Any) -> None:
    path = directory / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("preprocessor_config.json", {"patch_size": 14}, "patch_size 14 is not the 16 of config.json"),
    ("preprocessor_config.json", {"max_num_patches": 0}, "max_num_patches: "),
    ("preprocessor_config.json", {"max_num_patches": 10_000}, "max_num_patches: "),
    ("preprocessor_config.json", {"image_processor_type": "SiglipImageProcessor"}, "image_processor_type"),
    ("config.json", {"vision_config": {"num_patches": 200}}, "200 patches are no square grid"),
    ("config.json", {"vision_config": {"patch_size": [16, 16]}}, "vision_config.patch_size"),
    ("config.json", {"vision_config": {"patch_size": 128}}, "vision_config.patch_size: .*64"),
    ("config.json", {"vision_config": {"patch_size": 1}}, "vision_config.patch_size: .*2"),
    ("config.json", {"vision_config": {"vision_use_head": False}}, "vision_use_head"),
]


@pytest.mark.parametrize(("name", "values", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_settings_that_do_not_fit_are_refused_in_one_line(
    directory: Path, tmp_path: Path, name: str, values: dict[str, Any], message: str
) -> None:
    shutil.copytree(directory, tmp_path / "model")
    change_json(tmp_path / "model", name, **values)
    with pytest.raises(CheckpointError, match=message) as refused:
        pin(tmp_path / "model")
    assert "\n" not in str(refused.value)


def test_model_patches_is_refused_for_a_square_checkpoint() -> None:
    with pytest.raises(
        CheckpointError, match=r"model\.patches: this checkpoint sees 64 x 64 pixels.*leave it out"
    ) as refused:
        pin_model(ModelConfig(source="tiny", patches=256))
    assert "\n" not in str(refused.value)


def test_model_image_size_is_refused_for_a_naflex_checkpoint(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.image_size: .*set model\.patches") as refused:
        pin(directory, image_size=384)
    assert "\n" not in str(refused.value)


def test_fixed_resolution_weights_with_the_type_of_naflex_are_refused(tmp_path: Path) -> None:
    """Some fine-tuned copies have `model_type: siglip2` and the convolution of a square model."""
    directory = make_siglip2(tmp_path / "model")
    change_json(directory, "config.json", model_type="siglip2")
    change_json(directory, "preprocessor_config.json", image_processor_type="Siglip2ImageProcessor")
    with pytest.raises(CheckpointError, match=r"of another shape: \S+patch_embedding\.weight") as refused:
        Encoder(pin(directory))
    assert "\n" not in str(refused.value)


def test_a_naflex_checkpoint_with_the_tokenizer_of_siglip_gets_its_text_rule_by_its_files(tmp_path: Path) -> None:
    """What says how texts are read is the tokenizer's files, not the type of the model."""
    directory = make_naflex(tmp_path / "model")
    assert pin(directory).family == "siglip2"
    square = make_siglip(tmp_path / "square")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    for name in ("spiece.model", "tokenizer_config.json"):
        shutil.copy(square / name, directory / name)
    assert pin(directory).family == "siglip"


def test_open_clip_s_naflex_is_not_converted_as_a_square_model(tmp_path: Path) -> None:
    """timm's ViT-SO400M-16-SigLIP2-naflex has a tower of its own, and squares only as one of two ways."""
    vision = {"image_size": 384, "timm_model_name": "naflexvit_so400m_patch16_siglip", "timm_pool": "map"}
    with pytest.raises(CheckpointError, match=r"NaFlex .*use google/siglip2-base-patch16-naflex") as refused:
        read_settings({"model_cfg": {"init_logit_bias": -10, "vision_cfg": vision, "text_cfg": {}}}, "timm/x")
    assert "\n" not in str(refused.value)


def test_weights_that_were_saved_in_half_precision_are_loaded(directory: Path, tmp_path: Path, ours: Encoder) -> None:
    shutil.copytree(directory, tmp_path / "half")
    weights = load_file(tmp_path / "half/model.safetensors")
    save_file({name: value.bfloat16() for name, value in weights.items()}, tmp_path / "half/model.safetensors")
    pixels = decode(ours, make_rgb(640, 480))
    assert lowest(Encoder(pin(tmp_path / "half")).embed_images(pixels), ours.embed_images(pixels)) >= 0.999


def test_a_published_config_states_almost_nothing(directory: Path, tmp_path: Path) -> None:
    """Google's files name the types and the vocabulary. The rest is transformers' defaults."""
    shutil.copytree(directory, tmp_path / "model")
    text = {"model_type": "siglip2_text_model", "vocab_size": 256000}
    config = {"model_type": "siglip2", "text_config": text, "vision_config": {"model_type": "siglip2_vision_model"}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/preprocessor_config.json").write_text("{}")
    pinned = pin(tmp_path / "model")
    assert (pinned.width, pinned.text_length, pinned.spec.shape, pinned.spec.resample) == (768, 64, (257, 768), 2)
    assert pinned.vision_flops == pytest.approx(44e9, rel=0.1)
