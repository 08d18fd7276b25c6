"""The encoder: a loaded checkpoint that embeds images and texts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from siglip.checkpoint import PinnedModel
from siglip.checkpoints.files import CheckpointError
from siglip.checkpoints.self_test import (
    LEAST_COSINE,
    TEXTS,
    check_dtype,
    check_known,
    check_padding,
    check_position,
    check_tokenizer,
    draw_images,
    read_known,
)
from siglip.config import ImageSpec, ModelConfig
from siglip.cpu import CoreThreads
from siglip.families.tokenizer import Tokenizer, load_tokenizer
from siglip.images.patches import check_grids
from siglip.label_text.tokens import LabelReadings, Reading
from siglip.labels import LabelSet
from siglip.scoring import Floats, Scale, average_prompts
from siglip.tensors import view_as_tensor
from siglip.torch_internals import CompiledBySize, freeze_weights, multiplies_bfloat16
from siglip.towers.inputs import InputLayer
from siglip.towers.int8 import find_trouble, pack_tower, quantize_tower
from siglip.towers.naflex import NaFlexTower
from siglip.towers.vit import VisionTower
from siglip.weights import load_model

_LOG = logging.getLogger(__name__)
GPU_BATCH, CPU_BATCH, SMALL_CPU_BATCH = 256, 8, 64
CORE_ROWS = 4
"""Rows of a batch that a CPU core computes at a time. Activations then stay in the core's caches, and the cores finish
a batch at nearly the same time. Images/s of the base model in bfloat16 on two cores, in parts of 8, 4, 2 and 1: 12.4,
13.3, 13.2 and 13.0. A small model's batch is divided into one part for each core."""
LARGE_FLOPS = 1e10
"""Models that need more for an image are tested with one image when they are loaded, and not with three."""
TEXT_BATCH = 64
"""Texts in one forward pass. Splitting a list at multiples of this number changes no batch, and so no embedding."""


class Encoder:
    """A loaded SigLIP checkpoint: embeds images and texts as vectors of unit norm.

    Runs on the GPU if this process was given one (`gpus`), and otherwise on the CPU with the number of threads that
    torch is set to. It knows nothing of labels' meaning, thresholds, Ray or files.

    A compiled model has one graph for each batch size: `batch_size`, and those of `sizes` that are smaller. A batch is
    padded to the next of these sizes.

    Attributes: `spec` (preprocessing), `width` (D), `scale` (the learned logit scale and bias), `text_length` (tokens),
    `batch_size` (images in one forward pass), `dtype` (int8 if only the products of the vision tower's layers are),
    `min_cosine` (the lowest that the self-test's images have with their embeddings in float32; None in float32),
    `device`, `compiled`, `concurrency` (threads that may call `embed_images` at the same time: two on several cores, so
    that a core that has finished its part of one batch starts with the next batch). The other methods may be called by
    one thread only.

    Raises `siglip.checkpoints.files.CheckpointError` when the checkpoint cannot be used.
    """

    def __init__(self, pinned: PinnedModel, *, texts: bool = True, gpus: float = 0, sizes: Sequence[int] = ()) -> None:
        config = pinned.config
        self.device = choose_device(config, gpus)
        directory = pinned.fetch()
        self.spec: ImageSpec = pinned.spec
        dtype = choose_dtype(config, self.device)
        self.dtype = self._floats = torch.float32
        self.min_cosine: float | None = None
        model = load_model(directory, config.source, pinned.architecture, texts=texts)
        if pinned.new_size is not None and isinstance(model.vision_model, VisionTower):
            model.vision_model.embeddings.resize(pinned.new_size)
        self._rule = pinned.rule
        self._tokenizer = load_tokenizer(pinned, directory) if texts else None
        # The scale and bias stay float32: bfloat16 would round a bias of -12.93 to -12.94.
        self.scale = Scale(model.logit_scale.exp().item(), model.logit_bias.item())
        self.width = pinned.width
        self.text_length = pinned.text_length
        if self.device.type == "cpu":
            self._cores = CoreThreads(torch.get_num_threads(), None if pinned.is_small else CORE_ROWS)
        else:
            self._cores = CoreThreads(1)
        self.concurrency = min(2, self._cores.count)
        self.batch_size = choose_batch_size(pinned, self.device, self._cores)
        smaller = (size for size in sizes if size < self.batch_size)
        self._sizes = sorted({self._cores.fill(size) for size in (*smaller, self.batch_size)})
        self._text = model.text_model.to(self.device) if texts else None
        self._vision = model.vision_model.to(self.device)
        self._input = InputLayer(self.spec, self.device)
        self._convert(pinned, dtype)
        if isinstance(self._vision, NaFlexTower):
            images = torch.from_numpy(draw_images(self.spec)[:1]).to(self.device)
            check_padding(self._vision, *self._input(images, self._floats))
        self.compiled = choose_compile(config)
        if self.dtype == torch.int8 and not self.compiled:
            pack_tower(self._vision)
        self._forward: Callable[[torch.Tensor], torch.Tensor] = (
            CompiledBySize(self._embed_pixels) if self.compiled else self._embed_pixels
        )

    def _convert(self, pinned: PinnedModel, dtype: torch.dtype) -> None:
        """Move the towers from float32 to `dtype`, with the self-test before and after. Raises `CheckpointError`."""
        known = pinned.identity in read_known()
        pixels = draw_images(self.spec)
        if pinned.vision_flops > LARGE_FLOPS and not known and dtype != torch.int8:
            pixels = pixels[:1]
        rows = None
        if self._text is not None:
            tokenizer = self._get_tokenizer()
            check_tokenizer(tokenizer, self.text_length)
            rows = tokenizer.encode(TEXTS)[0]
            self._check_vocabulary(tokenizer.size)
            check_position(self._text, rows)
        if dtype == torch.float32 and not known:
            return  # there is nothing to compare
        images, texts = self._embed_known(pixels, rows)
        _check_norms(images, "images")
        _check_norms(texts, "texts")
        if dtype != torch.float32:
            expected = images, texts
            self.dtype = self._floats = dtype
            least = LEAST_COSINE
            if dtype == torch.int8:
                self._floats, least = choose_floats(self.device), pinned.config.min_cosine
                quantize_tower(self._vision, self._floats)
            else:
                self._vision.to(dtype)
            if self._text is not None:
                self._text.to(self._floats)
            images, texts = self._embed_known(pixels, rows)
            self.min_cosine = check_dtype(images, expected[0], dtype, "images", least)
            check_dtype(texts, expected[1], self._floats, "texts")
        if known and rows is not None:
            check_known(pinned.identity, images, texts, dtype)

    def _embed_known(self, pixels: NDArray[np.uint8], rows: NDArray[np.int64] | None) -> tuple[Floats, Floats]:
        """Embed the known images and, if there is a text tower, the known texts: float32 (N, D) and (M, D)."""
        with torch.inference_mode():
            images = self._embed_pixels(torch.from_numpy(pixels).to(self.device)).cpu().numpy()
            if rows is None:
                return images, np.zeros((0, self.width), np.float32)
            return images, self._embed_ids(torch.from_numpy(rows).to(self.device)).cpu().numpy()

    def embed_images(self, pixels: NDArray[np.uint8]) -> Floats:
        """Embed images: uint8 (N, *spec.shape) to float32 (N, D) of unit norm. N may be 0, or more than a batch.

        Raises `ValueError` for an image that says that it has more patches than there are, and `CheckpointError` if an
        embedding is no unit vector: finite weights may still overflow.
        """
        if not len(pixels):
            return np.zeros((0, self.width), np.float32)
        if self.spec.patches is not None:
            check_grids(pixels)
        rows = view_as_tensor(np.ascontiguousarray(pixels))  # a job's pixels are in Ray's store, which is read-only
        batches = (self._prepare_batch(batch) for batch in torch.split(rows, self.batch_size))
        embeddings = self._cores.run(self._forward, batches)[: len(rows)]
        return _check_norms(np.asarray(embeddings.cpu().numpy(), dtype=np.float32), "images")

    def _prepare_batch(self, batch: torch.Tensor) -> torch.Tensor:
        """Move a batch to the device. If the model is compiled, pad it to a size that has a graph."""
        count = len(batch)
        if self.compiled and count not in self._sizes:
            # Another shape would be compiled now, during the work.
            fits = next(size for size in self._sizes if size > count)
            batch = torch.cat([batch, batch.new_zeros(fits - count, *batch.shape[1:])])
        if self.device.type == "cuda":
            # Pinned and asynchronous: a batch is copied while the previous batch is computed.
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        return batch

    def warm_up(self) -> None:
        """Embed batches of black images, so that torch compiles the model or chooses its kernels.

        Raises `siglip.checkpoints.files.CheckpointError` when the embeddings are no unit vectors.
        """
        for count in self._sizes if self.compiled else [self.batch_size]:
            black = np.zeros((count, *self.spec.shape), np.uint8)
            if self.compiled:
                self._cores.run_first(self._embed_first, torch.from_numpy(black))
            self.embed_images(black[: self.batch_size])

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        """Embed texts: float32 (N, D) of unit norm. Tokens beyond the model's text length are cut off."""
        return self.embed_and_read(texts)[0]

    def embed_and_read(self, texts: Sequence[str]) -> tuple[Floats, list[Reading]]:
        """Embed texts: float32 (N, D) of unit norm, and what the model reads of each text."""
        ids, readings = self._get_tokenizer().read(texts)
        return self._embed_tokens(ids), readings

    def _embed_tokens(self, rows: NDArray[np.int64]) -> Floats:
        """Embed token ids, int64 (N, text_length): float32 (N, D) of unit norm."""
        if self._text is None:
            raise RuntimeError("this encoder was loaded without its text tower")
        if not len(rows):
            return np.zeros((0, self.width), np.float32)
        self._check_vocabulary(int(rows.max()) + 1)
        ids = torch.from_numpy(rows).to(self.device)
        embeddings = self._cores.run(self._embed_ids, torch.split(ids, TEXT_BATCH))
        return _check_norms(np.asarray(embeddings.cpu().numpy(), dtype=np.float32), "texts")

    def _check_vocabulary(self, tokens: int) -> None:
        assert self._text is not None
        if tokens > self._text.vocabulary:
            raise CheckpointError(
                f"model.source: its tokenizer has {tokens} tokens, the text tower {self._text.vocabulary}: use its own"
            )

    def tokenize(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids of texts in their canonical form, int64 (N, text_length). Tokens beyond that are cut off."""
        return self._get_tokenizer().encode(texts)[0]

    def read_labels(self, labels: LabelSet) -> LabelReadings:
        """What the model reads of a label set's prompts. Refuses and embeds nothing."""
        return self._get_tokenizer().read_labels(labels)[1]

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Number of tokens of each text in its canonical form, int64 (N,), with the end token.

        The model does not see tokens beyond `text_length`.
        """
        return self._get_tokenizer().count(texts)

    def _get_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise RuntimeError("this encoder was loaded without its tokenizer")
        return self._tokenizer

    def embed_labels(self, labels: LabelSet, warn: Callable[[str], None] = _LOG.warning) -> Floats:
        """Embed a label set: float32 (L, D) of unit norm, each label's prompts embedded, averaged, normalised again.

        `warn` gets a line if the tokenizer does not know some characters of the prompts. Raises
        `siglip.labels.LabelError`, before anything is embedded, when the model cannot read a label or cannot tell two
        apart, and `siglip.checkpoints.files.CheckpointError` when the embeddings are no unit vectors.
        """
        labels.check(self._rule)
        prompts = labels.prompts(self._rule)
        ids, found = self._get_tokenizer().read_labels(labels)
        found.check()
        if line := found.describe_partly_read():
            warn(line)
        return average_prompts(self._embed_tokens(ids), [len(group) for group in prompts])

    def _embed_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (B, *spec.shape) on the device to float32 (B, D) of unit norm."""
        inputs = self._input(pixels, self._floats)
        return torch.nn.functional.normalize(self._vision(*inputs).float(), dim=-1)

    def _embed_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 (B, text_length) on the device to float32 (B, D) of unit norm."""
        assert self._text is not None
        return torch.nn.functional.normalize(self._text(ids).float(), dim=-1)

    def _embed_first(self, pixels: torch.Tensor) -> torch.Tensor:
        """`_forward` for the first batch of a shape, which compiles it."""
        with freeze_weights(self.device.type == "cpu"):
            return self._forward(pixels)


def check_machine(config: ModelConfig, gpus: float) -> None:
    """Raise the errors that an `Encoder` would raise about this machine. Loads nothing."""
    choose_dtype(config, choose_device(config, gpus))
    choose_compile(config)


class DeviceError(CheckpointError):
    """The device that a model was given does not work. The message is one line that says what to check."""


def choose_device(config: ModelConfig, gpus: float) -> torch.device:
    """The device for a process that was given `gpus` GPUs.

    Raises `DeviceError` when a GPU was given or configured and CUDA does not work: on the CPU the work would take a
    hundred times as long, without any message.
    """
    works = torch.cuda.is_available()
    if config.device == "cpu" or (config.device == "auto" and not works and not gpus):
        return torch.device("cpu")
    if not works:
        build = (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else (f"torch {torch.__version__} is built without CUDA")
        )
        asked = "model.device: cuda" if config.device == "cuda" else f"num_gpus: {gpus:g}"
        raise DeviceError(
            f"{asked}: CUDA does not work here ({build}): check the driver and the build of torch, or use the CPU with "
            "model.device: cpu and num_gpus: 0"
        )
    return torch.device("cuda")


def _check_norms(vectors: Floats, what: str) -> Floats:
    """Return vectors. Raises `CheckpointError` unless their norm is 1: finite weights may overflow, to NaN or to 0."""
    if not (np.abs(np.linalg.norm(vectors, axis=-1) - 1) < 0.01).all():
        raise CheckpointError(f"model.source: the model's embeddings of {what} are not finite or 0: broken weights")
    return vectors


def choose_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype to compute in: `choose_floats` for `auto`. Raises `DeviceError` where int8 is asked for in vain."""
    if config.dtype == "auto":
        return choose_floats(device)
    if config.dtype == "int8" and (why := "is for CPUs" if device.type == "cuda" else find_trouble()):
        raise DeviceError(f"model.dtype: int8 {why}: use model.dtype: auto")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}[config.dtype]


def choose_floats(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, because emulation is slower, and float32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


def choose_batch_size(pinned: PinnedModel, device: torch.device, cores: CoreThreads) -> int:
    """Images in one forward pass: the configured number, rounded up to equal parts for the CPU's cores.

    `auto` is just enough rows to use the matrix units fully, because the last batch of a job has fewer rows.
    """
    size = pinned.config.batch_size
    if size == "auto":
        on_cpu = SMALL_CPU_BATCH if pinned.is_small else max(CPU_BATCH, cores.count)
        size = GPU_BATCH if device.type == "cuda" else on_cpu
    return cores.fill(size)


def choose_compile(config: ModelConfig) -> bool:
    """Whether to compile. `auto` compiles where there is a C++ compiler; callers with short jobs set it to False."""
    has_compiler = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    if config.compile is True and not has_compiler:
        raise CheckpointError("model.compile: true needs a C++ compiler: install g++, or set it to auto or false")
    if config.compile == "auto" and config.dtype == "int8" and not has_compiler:
        raise CheckpointError(
            "model.dtype: int8 is slower than bfloat16 if it is not compiled, which needs a C++ compiler: install g++, "
            "or use model.dtype: auto"
        )
    return has_compiler if config.compile == "auto" else config.compile
