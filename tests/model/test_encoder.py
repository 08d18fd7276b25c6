"""The encoder: compilation, several CPU cores, imports, and the architecture of SigLIP base."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import freezing
from torch.profiler import ProfilerActivity, profile
from transformers import pipeline

from sightline.demo.shapes import render
from siglip.checkpoint import pin_model
from siglip.checkpoints.architectures import init_checkpoint
from siglip.config import ImageSpec, Limits, ModelConfig
from siglip.cpu import CoreThreads
from siglip.encoder import Encoder
from siglip.images.decode import decode_image
from siglip.labels import LabelSet
from siglip.scoring import score_pairs, sigmoid
from tests.conftest import require
from tests.support.images import encode

NO_COMPILER = None if any(map(shutil.which, ("g++", "clang++", "c++"))) else "apt-get install g++"


@pytest.mark.slow
def test_a_compiled_encoder_gives_the_same_embeddings() -> None:
    require("C++ compiler", NO_COMPILER)
    encoder = Encoder(pin_model(ModelConfig(source="tiny", dtype="float32", compile=False)), texts=False)
    config = ModelConfig(source="tiny", dtype="float32", compile=True, batch_size=8)
    compiled = Encoder(pin_model(config), texts=False)
    pixels = np.random.default_rng(1).integers(0, 256, (13, 64, 64, 3), np.uint8)
    assert (compiled.embed_images(pixels) * encoder.embed_images(pixels)).sum(axis=1).min() >= 0.99999


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    """A function that sets torch's number of threads. The fixture restores the number after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_compiled_encoder_has_a_graph_for_small_batches(
    threads: int, torch_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    require("C++ compiler", NO_COMPILER)
    torch_threads(threads)
    torch._dynamo.reset()  # torch compiles one function at most eight times in a process
    frozen: list[tuple[Any, ...]] = []
    freeze = freezing.freeze

    def count_frozen(*arguments: Any) -> Any:
        frozen.append(arguments)
        return freeze(*arguments)

    monkeypatch.setattr(freezing, "freeze", count_frozen)
    config = ModelConfig(source="tiny", dtype="float32", compile=True, batch_size=16)
    encoder = Encoder(pin_model(config), texts=False, sizes=(1, 8, 64))
    computed: list[int] = []
    forward = encoder._forward

    def count(pixels: torch.Tensor) -> torch.Tensor:
        computed.append(len(pixels))
        return forward(pixels)

    encoder._forward = count
    encoder.warm_up()
    eight, sixteen = -(-8 // threads), -(-16 // threads)
    # One thread compiles the graph for all cores, and then each core computes a part of the batch.
    expected = [1] * 2 + [eight] * (1 + threads) + [sixteen] * (1 + threads)
    assert computed == expected, "all batch sizes that can occur must be compiled before the first image"
    assert len(frozen) == 3, "the weights must be packed once for each size, by the thread that compiles"
    plain = Encoder(pin_model(ModelConfig(source="tiny", dtype="float32", compile=False)), texts=False)
    pixels = np.random.default_rng(0).integers(0, 256, (27, *encoder.spec.shape), np.uint8)
    nine = eight if threads == 3 else sixteen  # three cores compute three images each
    for images, shapes in ((1, [1]), (2, [eight]), (8, [eight]), (9, [nine]), (27, [sixteen, nine])):
        computed.clear()
        vectors = encoder.embed_images(pixels[:images])
        assert sorted(computed, reverse=True) == (
            shapes if images == 1 else [part for part in shapes for _ in range(threads)]
        )
        assert (vectors * plain.embed_images(pixels[:images])).sum(axis=1).min() >= 0.99999


@pytest.mark.slow
def test_nothing_is_compiled_during_the_work(torch_threads: Callable[[int], None]) -> None:
    """Two threads with batches of several sizes: torch 2.13 alone missed a graph after some hundred calls."""
    require("C++ compiler", NO_COMPILER)
    torch_threads(2)
    torch._dynamo.reset()
    config = ModelConfig(source="tiny", dtype="float32", compile=True, batch_size=32)
    encoder = Encoder(pin_model(config), texts=False, sizes=(1, 8, 16))
    encoder.warm_up()
    compiled = counters["stats"]["unique_graphs"]

    def embed(seed: int) -> None:
        sizes = np.random.default_rng(seed).integers(1, 70, 250)
        for size in sizes.tolist():
            encoder.embed_images(np.zeros((size, 64, 64, 3), np.uint8))

    with ThreadPoolExecutor(2) as callers:
        assert [*callers.map(embed, range(2))] == [None, None]
    assert counters["stats"]["unique_graphs"] == compiled


def test_embeddings_from_several_cores_keep_the_order_of_the_images(torch_threads: Callable[[int], None]) -> None:
    torch_threads(3)
    encoder = Encoder(pin_model(ModelConfig(source="tiny", dtype="float32", compile=False)))
    torch_threads(1)
    single = Encoder(pin_model(ModelConfig(source="tiny", dtype="float32", compile=False)))
    assert (encoder.batch_size, single.batch_size) == (66, 64), (
        "the batch size must be a multiple of the number of cores"
    )
    pixels = np.random.default_rng(0).integers(0, 256, (140, *encoder.spec.shape), np.uint8)
    for count in (1, 2, 3, 4, 66, 140):
        np.testing.assert_allclose(encoder.embed_images(pixels[:count]), single.embed_images(pixels[:count]), atol=1e-6)
    texts = [f"a photo of {n} cats" for n in range(70)]
    np.testing.assert_allclose(encoder.embed_texts(texts), single.embed_texts(texts), atol=1e-6)


def test_weights_are_not_copied_for_each_token(torch_threads: Callable[[int], None]) -> None:
    """torch computes some products of 3-D tensors as many small ones, and copies the weights for each of them."""
    torch_threads(1)  # the profiler records this thread only
    config = ModelConfig(source="tiny", dtype="bfloat16", device="cpu", compile=False)
    encoder = Encoder(pin_model(config), texts=False)
    pixels = np.zeros((2, *encoder.spec.shape), np.uint8)
    encoder.embed_images(pixels)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        encoder.embed_images(pixels)
    names = {event.key for event in seen.key_averages()}
    assert "aten::addmm" in names
    assert "aten::bmm" not in names


@pytest.mark.parametrize(
    ("cores", "rows", "parts"),
    [
        (2, 16, [4, 4, 4, 4]),
        (2, 10, [3, 3, 2, 2]),
        (2, 8, [4, 4]),
        (2, 3, [2, 1]),
        (3, 2, [2]),
        (3, 18, [3] * 6),
        (1, 9, [3, 3, 3]),
        (1, 4, [4]),
    ],
)
def test_parts_are_small_and_the_same_number_for_each_core(
    cores: int, rows: int, parts: list[int], torch_threads: Callable[[int], None]
) -> None:
    """With unequal numbers of parts some cores would wait. Large parts do not fit a core's caches."""
    torch_threads(1)
    threads = CoreThreads(cores, 4)
    seen: list[int] = []

    def record(part: torch.Tensor) -> torch.Tensor:
        seen.append(len(part))
        return part + 1

    np.testing.assert_array_equal(threads.run(record, [torch.arange(rows)]), np.arange(rows) + 1)
    assert sorted(seen, reverse=True) == parts
    filled = threads.fill(rows)
    seen.clear()
    threads.run(record, [torch.arange(filled)])
    assert len(set(seen)) == 1, "all parts of a full batch must be equal"
    assert filled - rows < len(parts)


def test_core_threads_do_not_change_torchs_threads_elsewhere(torch_threads: Callable[[int], None]) -> None:
    """A new thread gets the number of threads that any thread set last. Without a reset, the endpoint's model would run
    on one core."""
    torch_threads(3)
    cores = CoreThreads(3)
    seen: list[int] = []

    def record(rows: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return rows

    cores.run(record, [torch.zeros(6)])
    with ThreadPoolExecutor(1) as other:
        assert (seen, other.submit(torch.get_num_threads).result()) == ([1, 1, 1], 3)


def test_no_core_waits_between_two_batches(torch_threads: Callable[[int], None]) -> None:
    """If cores waited for each other after each batch, one delayed core would delay all of them every time."""
    torch_threads(2)
    second = Event()

    def record(rows: torch.Tensor) -> torch.Tensor:
        if rows[0] == 0:
            assert second.wait(30), "the other core did not start the second batch"
        elif rows[0] == 2:
            second.set()
        return rows

    np.testing.assert_array_equal(CoreThreads(2).run(record, [torch.arange(2), torch.arange(2, 5)]), np.arange(5))


def test_an_error_on_a_core_is_raised(torch_threads: Callable[[int], None]) -> None:
    torch_threads(2)

    def fail(rows: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such row")

    with pytest.raises(ValueError, match="no such row"):
        CoreThreads(2).run(fail, [torch.zeros(4)])


def test_embedding_images_only_imports_neither_transformers_nor_the_compiler() -> None:
    """Importing transformers' model code takes two of five CPU seconds, and importing torch.compile one or more."""
    code = (
        "import sys; from siglip.checkpoint import pin_model; from siglip.config import ModelConfig; "
        "from siglip.encoder import Encoder; "
        "Encoder(pin_model(ModelConfig(source='tiny', compile=False)), texts=False).warm_up(); "
        "print({'transformers', 'sentencepiece', 'torch._dynamo'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_base_architecture_is_that_of_siglip_base_patch16_256(tmp_path: Path) -> None:
    count = init_checkpoint(tmp_path / "base", "base", seed=3)
    assert count == 203_202_050  # the hub's own count for google/siglip-base-patch16-256
    config = ModelConfig(source=str(tmp_path / "base"), dtype="float32", compile=False)
    pinned = pin_model(config)
    assert (pinned.width, pinned.text_length, pinned.spec) == (768, 64, ImageSpec(size=256))
    assert pinned.vision_flops == pytest.approx(44.4e9, rel=0.05)  # counted by torch's profiler
    encoder = Encoder(pinned)
    assert (encoder.width, encoder.text_length, encoder.spec.size) == (768, 64, 256)
    assert encoder.tokenize(["a cat"]).shape == (1, 64)
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "base"))
    image = render("red circle", random.Random(0), (300, 200))
    theirs = {item["label"]: item["score"] for item in classify(image, candidate_labels=["cat", "dog"])}
    pixels = decode_image(encode(image), encoder.spec, Limits()).pixels[None]
    texts = encoder.embed_labels(LabelSet.model_validate(["cat", "dog"]))
    ours = sigmoid(score_pairs(encoder.embed_images(pixels), texts, encoder.scale))[0]
    np.testing.assert_allclose(ours, [theirs["cat"], theirs["dog"]], rtol=1e-3)
    with pytest.raises(FileExistsError, match="not empty"):
        init_checkpoint(tmp_path / "base", "base")
