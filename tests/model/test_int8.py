"""`model.dtype: int8`: near the other dtypes, the same for an image in any batch, refused where it would be wrong.

Mistakes that people have made with int8 elsewhere, each with a test here:

* a scale for a whole batch or tensor, so that an embedding depends on its neighbours (onnxruntime#10111 and #8625,
  fastembed-rs#107), or that loses small channels (optimum-quanto#216: most numbers of a CLIP embedding became 0);
* outliers, after which embeddings or labels are nearly random (onnxruntime#9599, TinyNeuralNetwork#204, and in fp16
  TensorRT#4373 with a cosine of 0.6463), found by nobody because nothing compares the embeddings;
* CPUs without VNNI, on which sums of products overflow in 16 bits (pytorch#103646, FBGEMM#125, onnxruntime#6004 and
  #5849);
* reference kernels, a thousand times slower than the others (pytorch#180447; ao#4365 is a milder case);
* graphs that are compiled again during the work: see tests/model/test_encoder.py.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from typer.testing import CliRunner

import sightline
from curation.model import fit_machine
from pipelines.config import JobConfig
from pipelines.output.fingerprint import make_fingerprint
from serve.config import EndpointConfig
from serve.rayserve.replica import resolve_compile
from sightline.cli import app
from sightline.demo.shapes import LABELS, render
from siglip import encoder as encoder_module
from siglip.checkpoint import PinnedModel, pin_model
from siglip.checkpoints.architectures import init_checkpoint
from siglip.checkpoints.fidelity import Fidelity, count_relabelled, measure_fidelity
from siglip.checkpoints.files import CheckpointError
from siglip.checkpoints.self_test import TEXTS, check_dtype, draw_images
from siglip.config import ModelConfig
from siglip.encoder import DeviceError, Encoder, check_machine, choose_compile
from siglip.heads import build_head
from siglip.labels import LabelSet
from siglip.scoring import format_cosine, score_pairs
from siglip.torch_internals import has_vnni
from siglip.towers import int8 as int8_module
from siglip.towers.int8 import Int8Linear, gelu_by_sigmoid
from tests.conftest import require
from tests.model.test_encoder import NO_COMPILER
from tests.support.checkpoints import make_naflex
from tests.support.outliers import write_outliers

NO_VNNI = None if has_vnni() else "a CPU with AVX-512 VNNI is needed"


@pytest.fixture(autouse=True)
def _vnni(request: pytest.FixtureRequest) -> None:
    if "monkeypatch" not in request.fixturenames:
        require("AVX-512 VNNI", NO_VNNI)


def pin(source: str | Path = "tiny", dtype: Any = "int8", **settings: Any) -> PinnedModel:
    return pin_model(ModelConfig(**{"source": str(source), "dtype": dtype, "compile": False, **settings}))


def render_shapes(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Held-out images of the classes that the tiny checkpoint knows: uint8 (N, 64, 64, 3), and label indices (N,)."""
    rng = random.Random(77)
    numbers = [rng.randrange(len(LABELS)) for _ in range(count)]
    return np.stack([np.asarray(render(LABELS[number], rng)) for number in numbers]), np.array(numbers)


def make_layer(inputs: int = 192, outputs: int = 160) -> nn.Linear:
    torch.manual_seed(3)
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight *= torch.logspace(-3, 3, outputs)[:, None]  # a scale for all outputs would lose the small ones
    return layer


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of an output channel, beside the channel's own size."""
    return float(((found - expected).norm(dim=0) / expected.norm(dim=0)).max())


@torch.inference_mode()
def test_a_layer_has_a_scale_for_each_token_and_for_each_output() -> None:
    layer = make_layer()
    rows = torch.randn(40, 192) * torch.logspace(-6, 6, 40)[:, None]
    found, expected = Int8Linear(layer)(rows), layer(rows)
    own = relative_error((found / rows.norm(dim=1, keepdim=True)), expected / rows.norm(dim=1, keepdim=True))
    assert own < 0.02


@torch.inference_mode()
def test_a_row_does_not_depend_on_the_others() -> None:
    layer = Int8Linear(make_layer())
    row = torch.randn(1, 192)
    others = torch.cat([row, 1e4 * torch.randn(30, 192)])
    assert torch.equal(layer(row)[0], layer(others)[0])


@torch.inference_mode()
def test_the_largest_numbers_do_not_overflow() -> None:
    """Kernels for CPUs without VNNI add two products of uint8 and int8 in 16 bits: 2 x 255 x 127 is too large."""
    layer = nn.Linear(4096, 16, bias=False)
    layer.weight.fill_(0.5)
    layer.bias = nn.Parameter(torch.ones(16))
    found = Int8Linear(layer)(torch.full((3, 4096), 2.0))
    torch.testing.assert_close(found, torch.full((3, 16), 4097.0))
    torch.testing.assert_close(Int8Linear(layer)(torch.full((3, 4096), -2.0)), torch.full((3, 16), -4095.0))


@torch.inference_mode()
def test_zeros_stay_zeros_and_broken_numbers_stay_broken() -> None:
    layer = make_layer()
    layer.weight[5] = 0
    quantized = Int8Linear(layer)
    torch.testing.assert_close(quantized(torch.zeros(2, 192)), layer.bias.expand(2, -1))
    assert quantized(torch.randn(2, 192))[:, 5].allclose(layer.bias[5])
    for broken in (float("nan"), float("inf")):
        rows = torch.randn(2, 192)
        rows[1, 7] = broken
        found = quantized(rows)
        assert found[0].isfinite().all()
        assert not found[1].isfinite().any(), "a number that is not finite must not become a plausible one"


@torch.inference_mode()
def test_a_packed_layer_gives_the_same_numbers() -> None:
    layer, rows = Int8Linear(make_layer()), torch.randn(2, 7, 192, dtype=torch.bfloat16)
    before = layer(rows)
    layer.pack()
    assert (before.dtype, before.shape) == (torch.bfloat16, (2, 7, 160))
    assert torch.equal(layer(rows), before)
    assert layer.weight is None


def test_the_other_form_of_gelu_is_gelu() -> None:
    values = torch.linspace(-12, 12, 10_001)
    expected = nn.functional.gelu(values.double(), approximate="tanh").float()
    torch.testing.assert_close(gelu_by_sigmoid(values), expected, atol=1e-5, rtol=1e-5)
    assert gelu_by_sigmoid(values.bfloat16()).dtype == torch.bfloat16
    assert not gelu_by_sigmoid(torch.tensor([float("nan")])).isfinite()


def test_an_image_has_the_same_embedding_beside_any_others() -> None:
    encoder = Encoder(pin(), texts=False)
    rng = np.random.default_rng(0)
    image = draw_images(encoder.spec)[:1]
    for others in (np.zeros((9, 64, 64, 3)), np.full((9, 64, 64, 3), 255), rng.integers(0, 256, (9, 64, 64, 3))):
        beside = encoder.embed_images(np.concatenate([image, others.astype(np.uint8)]))[0]
        assert (beside @ encoder.embed_images(image)[0]) >= 0.99999
        np.testing.assert_array_equal(beside, encoder.embed_images(np.concatenate([image, image.repeat(9, 0)]))[0])


def test_the_shipped_checkpoint_finds_the_same_labels() -> None:
    """On the 4,000 held-out images of scripts/train_tiny.py top-1 is 0.9945 in bfloat16 and 0.9948 in int8."""
    pixels, numbers = render_shapes(500)
    exact, quantized = Encoder(pin(dtype="auto")), Encoder(pin())
    labels = exact.embed_labels(LabelSet(names=LABELS))
    vectors = [encoder.embed_images(pixels) for encoder in (exact, quantized)]
    expected, found = (score_pairs(each, labels, exact.scale).argmax(axis=1) for each in vectors)
    assert abs((found == numbers).mean() - (expected == numbers).mean()) <= 0.005
    cosines = (vectors[0] * vectors[1]).sum(axis=1)
    assert cosines.min() >= 0.998
    assert cosines.mean() >= 0.9995
    np.testing.assert_array_equal(exact.embed_texts(TEXTS), quantized.embed_texts(TEXTS))
    assert quantized.dtype == torch.int8
    assert quantized.min_cosine is not None
    assert 0.999 <= quantized.min_cosine < 1


def test_weights_are_not_kept_in_other_dtypes() -> None:
    encoder = Encoder(pin(), texts=False)
    transformer = encoder._vision.encoder
    tensors = [*transformer.parameters(), *transformer.buffers()]
    layers = [module for module in transformer.modules() if isinstance(module, Int8Linear)]
    packed = [layer.packed for layer in layers if layer.packed is not None]
    assert len(packed) == len(layers) == 4 * 6
    assert sum(tensor.numel() for tensor in packed) == 4 * (4 * 128**2 + 2 * 128 * 512)
    assert {tensor.dtype for tensor in packed} == {torch.int8}
    assert all(tensor.dim() == 1 for tensor in tensors), "only biases, scales and normalisations are left"
    assert {layer.scale.dtype for layer in layers} == {torch.float32}


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with three channels of 100 times the size, in a form that computes the same function."""
    return write_outliers(tmp_path_factory.mktemp("outliers") / "checkpoint", factor=100)


def test_outlier_channels_are_refused_when_the_model_is_loaded(outliers: Path) -> None:
    pixels, _ = render_shapes(20)
    exact, same = (Encoder(pin(source, "float32"), texts=False).embed_images(pixels) for source in ("tiny", outliers))
    assert (exact * same).sum(axis=1).min() >= 0.99999
    assert (exact * Encoder(pin(outliers, "bfloat16"), texts=False).embed_images(pixels)).sum(axis=1).min() >= 0.999
    with pytest.raises(
        CheckpointError, match=r"model.dtype: int8: .* cosine of 0.9.*min_cosine.*: use.*auto"
    ) as refused:
        Encoder(pin(outliers))
    assert "\n" not in str(refused.value)


def test_outlier_channels_are_refused_on_a_runs_images(outliers: Path) -> None:
    pixels, _ = render_shapes(40)
    labels = LabelSet(names=LABELS)
    plain = Encoder(pin(dtype="auto"))
    head = build_head(labels, plain.embed_labels(labels), plain.scale, "")
    good = measure_fidelity(pin(), pixels, labels, head)
    good.check(0.99)
    assert (good.dtype, good.reference, good.images) == ("int8", str(plain.dtype).removeprefix("torch."), 40)
    bad = measure_fidelity(pin(outliers, min_cosine=-1), pixels, labels, head)
    assert bad.min_cosine < 0.95 < bad.mean_cosine < good.min_cosine
    assert bad.relabelled > good.relabelled
    with pytest.raises(CheckpointError, match=r"model.dtype: int8 .*model.min_cosine is 0.99: use model.dtype: auto"):
        bad.check(0.99)


def test_the_bound_is_for_the_cosine_itself_and_not_for_a_rounded_one() -> None:
    def measure(lowest: float) -> Fidelity:
        return Fidelity("int8", "bfloat16", 32, lowest, 1.0, 0)

    for least in (0.99, 0.5, 1.0, -1.0):
        measure(least).check(least)
    with pytest.raises(CheckpointError, match=r"cosine 0.98999 at least.* and model.min_cosine is 0.99:"):
        measure(0.989996).check(0.99)
    with pytest.raises(CheckpointError, match=r"cosine 0.99999 at least.* and model.min_cosine is 1:"):
        measure(0.999996).check(1.0)
    with pytest.raises(CheckpointError):
        measure(float("nan")).check(-1.0)
    embeddings = np.array([[1, 0]], np.float32), np.array([[0.989996, 0]], np.float32)
    with pytest.raises(CheckpointError, match=r"a cosine of 0.98999 .* 0.99 \(model.min_cosine\)"):
        check_dtype(*embeddings, torch.int8, "images", 0.99)
    assert [format_cosine(value) for value in (0.99966, 1.0, -1.0)] == ["0.99966", "1.00000", "-1.00000"]


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_bound_that_would_be_ignored_is_refused(dtype: str) -> None:
    """In settings that people write. Outputs of earlier versions may have it."""
    settings = {"dtype": dtype, "min_cosine": 0.9}
    for use in (
        lambda: JobConfig.model_validate({"input": ["in"], "output": "out", "labels": ["a"], "model": settings}),
        lambda: EndpointConfig.model_validate({"model": settings}),
    ):
        with pytest.raises(ValidationError, match="min_cosine is for dtype: int8"):
            use()
    assert ModelConfig.model_validate(settings).min_cosine == 0.9
    EndpointConfig.model_validate({"model": {"dtype": "int8", "min_cosine": 0.9}})


_SUMS = """
from siglip.checkpoint import pin_model
from siglip.config import ModelConfig
from siglip.encoder import DeviceError, Encoder
try:
    Encoder(pin_model(ModelConfig(dtype="int8", compile=False)), texts=False)
except DeviceError as error:
    print(error)
"""


@pytest.mark.parametrize("most", ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI"])
def test_a_library_that_is_kept_from_vnni_is_refused(most: str) -> None:
    """The CPU has VNNI, and oneDNN does not use it: with AVX2 the self-test's images show nothing of wrong sums."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": most}
    command = [sys.executable, "-c", _SUMS]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert ("gives wrong sums here" in done.stdout) == (most != "AVX512_CORE_VNNI"), done.stdout


def test_an_output_in_int8_is_read_on_a_machine_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(dtype="int8", min_cosine=0.5, compile=True)
    assert fit_machine(config) == config.model_copy(update={"compile": False})
    monkeypatch.setattr(int8_module, "has_vnni", lambda: False)
    fitting = fit_machine(config)
    assert (fitting.dtype, fitting.compile) == ("auto", False)
    Encoder(pin_model(fitting), texts=False)
    if not torch.cuda.is_available():
        assert fit_machine(ModelConfig(device="cuda")).device == "auto"


def test_model_check_tells_the_cosine() -> None:
    result = CliRunner().invoke(app, ["model", "check", "tiny", "--dtype", "int8"])
    lowest = Encoder(pin(), texts=False).min_cosine
    assert lowest is not None
    assert f"images have a cosine of {format_cosine(lowest)} at least with float32" in result.stdout
    for arguments, message in [
        (["--dtype", "int8", "--min-cosine", "1"], "cosine of 0.9"),
        (["--min-cosine", "0.9"], "min_cosine is for dtype: int8, and dtype is auto"),
    ]:
        refused = CliRunner().invoke(app, ["model", "check", "tiny", *arguments])
        assert refused.exit_code == 2
        assert message in refused.stderr


def test_images_whose_labels_differ_are_counted() -> None:
    labels = LabelSet(names=["a", "b"], threshold=0.5, top_k=1)
    head = build_head(labels, np.eye(2, dtype=np.float32), Encoder(pin(dtype="auto")).scale, "")
    before = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    assert count_relabelled((before, head), (before, head), labels) == 0
    assert count_relabelled((before[[1, 1, 0]], head), (before, head), labels) == 1


def test_int8_is_refused_where_it_cannot_be_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_module, "has_vnni", lambda: False)
    for use in (lambda: check_machine(pin().config, 0), lambda: Encoder(pin(), texts=False)):
        with pytest.raises(DeviceError, match=r"int8 needs a CPU with AVX-512 VNNI.*: use model.dtype: auto"):
            use()
    monkeypatch.setattr(int8_module, "has_vnni", lambda: True)
    with pytest.raises(DeviceError, match=r"int8 is for CPUs: use model.dtype: auto"):
        encoder_module.choose_dtype(pin().config, torch.device("cuda"))


def test_int8_is_compiled_unless_that_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = ModelConfig(dtype="int8")
    assert resolve_compile(auto).compile == "auto"
    assert resolve_compile(ModelConfig()).compile is False or torch.cuda.is_available()
    monkeypatch.setattr("siglip.encoder.shutil.which", lambda name: None)
    with pytest.raises(CheckpointError, match=r"int8 is slower .*: install g\+\+, or use model.dtype: auto"):
        choose_compile(auto)
    assert choose_compile(ModelConfig(dtype="int8", compile=False)) is False
    assert choose_compile(ModelConfig()) is False


def test_auto_is_never_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    for vnni in (True, False):
        monkeypatch.setattr(int8_module, "has_vnni", lambda vnni=vnni: vnni)
        chosen = encoder_module.choose_dtype(ModelConfig(), torch.device("cpu"))
        assert chosen in (torch.bfloat16, torch.float32)


def test_without_bfloat16_the_rest_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    require("AVX-512 VNNI", NO_VNNI)
    monkeypatch.setattr(encoder_module, "multiplies_bfloat16", lambda: False)
    encoder = Encoder(pin(), texts=False)
    exact = Encoder(pin(dtype="float32"), texts=False)
    assert encoder._vision.post_layernorm.weight.dtype == torch.float32
    pixels, _ = render_shapes(20)
    assert (encoder.embed_images(pixels) * exact.embed_images(pixels)).sum(axis=1).min() >= 0.999


def test_only_int8_is_in_the_fingerprint() -> None:
    def describe(dtype: str) -> dict[str, Any]:
        pinned = pin(dtype=dtype)
        keys = {"input": ["in"], "output": "out", "labels": ["a"], "model": pinned.config.model_dump()}
        return make_fingerprint(JobConfig.model_validate(keys), pinned, pa.schema([]))

    assert describe("auto") == describe("bfloat16") == describe("float32")
    assert describe("int8") == {**describe("auto"), "model.dtype": "int8"}


_COMPILE = """
import sys
import numpy as np
import torch
from siglip.checkpoint import pin_model
from siglip.config import ModelConfig
from siglip.encoder import Encoder
torch.set_num_threads(1)
pixels = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
found = []
for dtype, compiled in (("auto", True), ("int8", True), ("auto", True), ("int8", False), ("auto", False)):
    config = ModelConfig(source=sys.argv[1], dtype=dtype, compile=compiled, batch_size=8)
    encoder = Encoder(pin_model(config), texts=False)
    encoder.warm_up()
    found.append(encoder.embed_images(pixels))
np.save(sys.argv[2], np.stack(found))
"""


@pytest.mark.slow
def test_graphs_of_two_dtypes_do_not_mix_and_use_fast_kernels(tmp_path: Path) -> None:
    """With one cache for all graphs. The widths are those of so400m: 4,304 is no multiple of a vector's length."""
    require("C++ compiler", NO_COMPILER)
    source, result = tmp_path / "checkpoint", tmp_path / "found.npy"
    init_checkpoint(source, "tiny")
    widen(source)
    environment = {**os.environ, "ONEDNN_VERBOSE": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", _COMPILE, str(source), str(result)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    auto, int8, again, plain_int8, plain = np.load(result)
    assert np.array_equal(auto, again)
    for one, other, least in ((auto, plain, 0.999), (int8, plain_int8, 0.999), (int8, auto, 0.99)):
        assert (one * other).sum(axis=1).min() >= least
    assert (int8 * plain_int8).sum(axis=1).mean() > (int8 * auto).sum(axis=1).mean()
    products = [line for line in done.stdout.splitlines() if ",exec,cpu,matmul," in line and "src:u8" in line]
    kernels = {line.partition(",matmul,")[2].partition(",")[0] for line in products}
    assert kernels
    assert all("vnni" in kernel or "amx" in kernel for kernel in kernels), kernels


def widen(directory: Path) -> None:
    """Make a checkpoint of random weights one whose vision tower has two layers of so400m's widths."""
    from transformers import SiglipConfig, SiglipModel

    config = SiglipConfig.from_pretrained(directory)
    for name, value in {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
    }.items():
        setattr(config.vision_config, name, value)
    config.text_config.projection_size = 1152
    torch.manual_seed(0)
    SiglipModel(config).save_pretrained(directory)


def test_a_naflex_model_in_int8(tmp_path: Path) -> None:
    make_naflex(tmp_path / "naflex")
    exact, quantized = (Encoder(pin(tmp_path / "naflex", dtype), texts=False) for dtype in ("float32", "int8"))
    images = draw_images(exact.spec)
    vectors = quantized.embed_images(images)
    assert (exact.embed_images(images) * vectors).sum(axis=1).min() >= 0.99
    for place in range(len(images)):
        alone = quantized.embed_images(images[place : place + 1])[0]
        assert alone @ vectors[place] >= 0.99999


def test_the_python_encoder_gives_the_memory_of_loading_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[bool] = []
    monkeypatch.setattr("sightline.encoder.release_memory", lambda: given_back.append(True))
    assert sightline.Encoder.load("tiny", dtype="int8").images([np.zeros((8, 8, 3), np.uint8)]).shape == (1, 128)
    assert given_back == [True]
    with pytest.raises(sightline.ConfigError, match=r"model.dtype: int8: .*cosine of 0.9.*min_cosine"):
        sightline.Encoder.load("tiny", dtype="int8", min_cosine=1)
