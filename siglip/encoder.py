"""A checkpoint at work: its weights loaded, images and texts embedded."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import nn

from siglip.checkpoint import Architecture, CheckpointError, PinnedModel, quiet_transformers
from siglip.config import ImageSpec, ModelConfig
from siglip.cpu import CoreThreads
from siglip.labels import LabelSet
from siglip.scoring import Floats, Scale, average_prompts
from siglip.towers.text import TextTower
from siglip.towers.vit import VisionTower

GPU_BATCH, CPU_BATCH, SMALL_CPU_BATCH = 256, 8, 64
CORE_ROWS = 4
"""What a CPU's core takes of a batch at a time: what is between two operations stays in its caches, and the last part
is soon over. The base model's images in bfloat16 on two cores, in parts of 8, 4, 2 and 1: 12.4, 13.3, 13.2 and 13.0/s.
Of a small model's batch each core takes one part."""
TEXT_BATCH = 64
"""Texts in one forward pass. Cutting a list at multiples of it changes no batch, and so no number."""


class Encoder:
    """A SigLIP checkpoint, loaded and ready: images and texts in, unit vectors out.

    Runs on the GPU when this process was given one (`gpus`), else on the CPU with the threads that torch was given
    before. It knows nothing of labels' meaning, thresholds, Ray or files.

    A compiled model has one graph for each batch size: `batch_size`, and of `sizes` those that are smaller. A batch is
    filled up to the next of them.

    Attributes: `spec` (preprocessing), `width` (D), `scale` (the learned logit scale and bias), `text_length` (tokens),
    `batch_size` (images in one forward pass), `dtype`, `device`, `compiled`, `concurrency` (threads that may call
    `embed_images` at the same time: on several cores two, so that those that are done with a batch begin the next one).
    The other methods are one thread's.

    Raises `siglip.checkpoint.CheckpointError` when the checkpoint cannot be used.
    """

    def __init__(self, pinned: PinnedModel, *, texts: bool = True, gpus: float = 0, sizes: Sequence[int] = ()) -> None:
        config = pinned.config
        self.device = choose_device(config, gpus)
        directory = pinned.fetch()
        self.spec: ImageSpec = pinned.spec
        self.dtype = choose_dtype(config, self.device)
        model = load_model(directory, config.source, pinned.architecture, texts=texts)
        self._rule = pinned.rule
        if texts:
            quiet_transformers()
        try:
            self._tokenizer = self._rule.load_tokenizer(directory) if texts else None
        except Exception as error:  # each tokenizer library raises types of its own on bad files
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"model.source: {config.source}: its tokenizer: {reason}") from error
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
        self._text = model.text_model.to(self.device, self.dtype) if texts else None
        self._vision = model.vision_model.to(self.device, self.dtype)
        mean, std = torch.tensor(self.spec.mean), torch.tensor(self.spec.std)
        # (pixel / 255 - mean) / std as one multiply and one add.
        self._gain = (1 / (255 * std)).view(1, 3, 1, 1).to(self.device)
        self._offset = (-mean / std).view(1, 3, 1, 1).to(self.device)
        self.compiled = choose_compile(config)
        self._forward: Callable[[torch.Tensor], torch.Tensor] = (
            torch.compile(self._embed_pixels, dynamic=False) if self.compiled else self._embed_pixels
        )

    def embed_images(self, pixels: NDArray[np.uint8]) -> Floats:
        """uint8 (N, S, S, 3) to float32 (N, D) of unit norm. Any N, also 0: it is cut into batches here."""
        if not len(pixels):
            return np.zeros((0, self.width), np.float32)
        with warnings.catch_warnings():  # of a job's pixels, which lie in Ray's store: here they are only read
            warnings.filterwarnings("ignore", ".*not writable.*", UserWarning)
            rows = torch.from_numpy(np.ascontiguousarray(pixels))
        batches = (self._prepare_batch(batch) for batch in torch.split(rows, self.batch_size))
        embeddings = self._cores.run(self._forward, batches)[: len(rows)]
        return np.asarray(embeddings.cpu().numpy(), dtype=np.float32)

    def _prepare_batch(self, batch: torch.Tensor) -> torch.Tensor:
        """A batch on the device; a last one filled up to a size that has a graph."""
        count = len(batch)
        if self.compiled and count not in self._sizes:
            # Another shape would compile again in the middle of the work.
            fits = next(size for size in self._sizes if size > count)
            batch = torch.cat([batch, batch.new_zeros(fits - count, *batch.shape[1:])])
        if self.device.type == "cuda":
            # Pinned and asynchronous: the copy of one batch runs while the one before is computed.
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        return batch

    def warm_up(self) -> None:
        """First batches, which compile or pick kernels, of black images.

        Raises `siglip.checkpoint.CheckpointError` when what comes out is not finite.
        """
        size = self.spec.size
        for count in self._sizes if self.compiled else [self.batch_size]:
            black = np.zeros((count, size, size, 3), np.uint8)
            if self.compiled:
                self._cores.run_first(self._embed_first, torch.from_numpy(black))
            _check_finite(self.embed_images(black[: self.batch_size]), "images")

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        """Texts to float32 (N, D) of unit norm. Text beyond the model's length is cut off."""
        if self._text is None:
            raise RuntimeError("this encoder was loaded without its text tower")
        if not texts:
            return np.zeros((0, self.width), np.float32)
        ids = torch.from_numpy(self.tokenize(texts)).to(self.device)
        if int(ids.max()) >= self._text.vocabulary:
            raise CheckpointError(
                f"model.source: its tokenizer has more tokens than its text tower ({self._text.vocabulary})"
            )
        embeddings = self._cores.run(self._embed_ids, torch.split(ids, TEXT_BATCH))
        return np.asarray(embeddings.cpu().numpy(), dtype=np.float32)

    def tokenize(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Canonical text to token ids, int64 (N, text_length).

        Always padded to the full length and without an attention mask: SigLIP was trained so, and scores the last
        position. Shorter padding gives other, wrong, scores without an error.
        """
        if self._tokenizer is None:
            raise RuntimeError("this encoder was loaded without its tokenizer")
        encoded = self._tokenizer(
            [self._rule.canonicalize(text) for text in texts],
            padding="max_length",
            max_length=self.text_length,
            truncation=True,
            return_tensors="np",
        )
        return np.asarray(encoded["input_ids"], dtype=np.int64)

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Each canonical text's tokens and its end, int64 (N,). What is over `text_length` the model never sees."""
        if self._tokenizer is None:
            raise RuntimeError("this encoder was loaded without its tokenizer")
        ids = self._tokenizer([self._rule.canonicalize(text) for text in texts], truncation=False)["input_ids"]
        return np.asarray([len(one) for one in ids], dtype=np.int64)

    def embed_labels(self, labels: LabelSet) -> Floats:
        """A label set to float32 (L, D) of unit norm: each label's prompts embedded, averaged, normalised again.

        Raises `siglip.labels.LabelError` when the model cannot tell the labels apart, and
        `siglip.checkpoint.CheckpointError` when what comes out is not finite.
        """
        labels.check(self._rule)
        prompts = labels.prompts(self._rule)
        vectors = self.embed_texts([prompt for group in prompts for prompt in group])
        _check_finite(vectors, "texts")
        return average_prompts(vectors, [len(group) for group in prompts])

    def _embed_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) on the device to float32 (B, D) of unit norm."""
        scaled = pixels.permute(0, 3, 1, 2).float() * self._gain + self._offset
        return torch.nn.functional.normalize(self._vision(scaled.to(self.dtype)).float(), dim=-1)

    def _embed_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 (B, text_length) on the device to float32 (B, D) of unit norm."""
        assert self._text is not None
        return torch.nn.functional.normalize(self._text(ids).float(), dim=-1)

    def _embed_first(self, pixels: torch.Tensor) -> torch.Tensor:
        """`_forward` for a shape that it is compiled for by this."""
        from torch._inductor import config as inductor

        # Weights are constants here: freezing packs them once into the layout that the matrix kernels want. Said where
        # it compiles, because inductor's settings are each thread's own.
        with inductor.patch(freezing=self.device.type == "cpu"):
            return self._forward(pixels)


class Siglip(nn.Module):
    """Both towers, and the scale and bias of their cosines: a checkpoint's whole weights."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.text_model = TextTower(architecture.text_config)
        self.vision_model = VisionTower(architecture.vision_config)
        self.logit_scale, self.logit_bias = (nn.Parameter(torch.empty(1)) for _ in range(2))


def check_machine(config: ModelConfig, gpus: float) -> None:
    """Raise what an `Encoder` would raise of the machine that it is on; loads nothing."""
    choose_device(config, gpus)
    choose_compile(config)


class DeviceError(CheckpointError):
    """The device that a model was promised does not work. The message is one line that says what to check."""


def choose_device(config: ModelConfig, gpus: float) -> torch.device:
    """The device for a process that was given so many GPUs.

    Raises `DeviceError` where one was given or asked for and CUDA does not work: on a CPU the work would be done a
    hundred times slower, without a word.
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


def load_model(directory: Path, source: str, architecture: Architecture, *, texts: bool = True) -> Siglip:
    """A checkpoint's weights in float32, whatever type they have there; in one file or in shards.

    Without `texts` the text tower's are not read, and stay on torch's `meta` device. Raises `CheckpointError`, naming
    the first few, for weights that are missing, not the model's, of another shape, or not finite. Position ids, which
    older versions of transformers saved, are no weights.
    """
    with torch.device("meta"):
        model = Siglip(architecture)
    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in _list_weights(directory)]
            found = {name: file for file in files for name in list(file.keys()) if not name.endswith(".position_ids")}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in found.items()}
            fit = [name for name in wanted if shapes.get(name) == wanted[name]]
            # Copied, for what is mapped from a file changes, or is gone, with the file.
            weights = {
                name: found[name].get_tensor(name).to(torch.float32, copy=True)
                for name in fit
                if texts or not name.startswith("text_model.")
            }
    except Exception as error:  # safetensors raises types of its own on bad files, and of Python on bad names
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"model.source: {source}: {reason}") from error
    problems = {
        "missing": wanted.keys() - found.keys(),
        "of another shape": (wanted.keys() & found.keys()) - set(fit),
        "not this model's": found.keys() - wanted.keys(),
        "not finite": [name for name, weight in weights.items() if not weight.isfinite().all()],
    }
    wrong = [f"{what}: {_show_names(sorted(names))}" for what, names in problems.items() if names]
    if wrong:
        raise CheckpointError(
            f"model.source: {source}: its weights are not those of its config.json ({'; '.join(wrong)})"
        )
    model.load_state_dict(weights, strict=False, assign=True)
    return model.requires_grad_(False).eval()


def _list_weights(directory: Path) -> list[Path]:
    """A checkpoint's safetensors files, by its index where there is no whole one."""
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        return [whole]
    named: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return [directory / name for name in sorted(set(named.values()))]


def _show_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


def _check_finite(vectors: Floats, what: str) -> None:
    """Finite weights may still overflow."""
    if not np.isfinite(vectors).all():
        raise CheckpointError(f"model.source: the model's embeddings of {what} are not finite: its weights are no good")


def choose_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where it is multiplied natively: on a CPU without it, it is emulated and slower."""
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def choose_batch_size(pinned: PinnedModel, device: torch.device, cores: CoreThreads) -> int:
    """What is asked for, in equal parts for a CPU's cores. `auto` is enough rows to fill the matrix units, and no more:
    the last batch of a job has fewer."""
    size = pinned.config.batch_size
    if size == "auto":
        on_cpu = SMALL_CPU_BATCH if pinned.is_small else max(CPU_BATCH, cores.count)
        size = GPU_BATCH if device.type == "cuda" else on_cpu
    return cores.fill(size)


def choose_compile(config: ModelConfig) -> bool:
    """`auto` compiles when a C++ compiler is there; callers with short jobs resolve it to False before."""
    has_compiler = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    if config.compile is True and not has_compiler:
        raise CheckpointError("model.compile: true needs a C++ compiler: install g++, or set it to auto or false")
    return has_compiler if config.compile == "auto" else config.compile
