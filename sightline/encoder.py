"""The Python API's encoder: images and texts in, NumPy arrays out, with the batch job's numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

import siglip.encoder
from siglip.checkpoint import PinnedModel, pin_model
from siglip.checkpoints.files import CheckpointError
from siglip.config import MIN_COSINE, DType, Limits, check_model
from siglip.cpu import release_memory
from siglip.heads import LinearHead, build_head
from siglip.images.decode import DecodeMode, ImageRejected, decode_image, resize_image
from siglip.labels import LabelError, LabelSet
from siglip.scoring import Floats
from storage.mirror import Mirror
from storage.settings import ConfigError, describe_error
from storage.store import StoreError, StoreOptions

ImageInput = str | PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
"""An image: the path of a file, the bytes of a file, a Pillow image, or RGB pixels as uint8 (H, W, 3)."""


class Encoder:
    """A SigLIP checkpoint in this process. `Encoder.load` makes it.

    It decodes, resizes, embeds and scores with the functions that the batch job uses, so an image gets the batch job's
    numbers. It needs neither Ray nor a running endpoint. Not thread-safe.

    It decodes in this process. The batch job and the endpoint decode in child processes, because a damaged file can
    crash a decoder: use those for files that you do not trust.
    """

    def __init__(self, pinned: PinnedModel, decode: DecodeMode = "auto", limits: Limits | None = None) -> None:
        """Load the weights. `Encoder.load` takes a checkpoint's name instead."""
        self._pinned = pinned
        self._decode: DecodeMode = decode
        self._limits = limits or Limits()
        with _as_config_errors():
            self._encoder = siglip.encoder.Encoder(pinned)
            self._encoder.warm_up()
        release_memory()

    @classmethod
    def load(
        cls,
        source: str = "tiny",
        *,
        revision: str | None = None,
        dtype: DType = "auto",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        batch_size: int | Literal["auto"] = "auto",
        compile: bool = False,
        text_rule: Literal["auto", "canonicalize", "lowercase"] = "auto",
        image_size: int | None = None,
        patches: int | None = None,
        min_cosine: float = MIN_COSINE,
        decode: DecodeMode = "auto",
        limits: Limits | None = None,
    ) -> Encoder:
        """Load a checkpoint: a hub id, a folder, an s3://, gs:// or az:// prefix, or "tiny", which comes with it.

        The parameters mean what the keys of `model` in a job's configuration mean, and have the same defaults, except
        `compile`: torch.compile takes about a minute, which only long work earns back. `decode` and `limits` are a
        job's keys too; images over `limits.max_pixels` and `limits.max_bytes` are rejected.

        Raises `ConfigError`, in one line, when the checkpoint or the device cannot be used.
        """
        settings = {
            "source": source,
            "revision": revision,
            "dtype": dtype,
            "device": device,
            "batch_size": batch_size,
            "compile": compile,
            "text_rule": text_rule,
            "image_size": image_size,
            "patches": patches,
            "min_cosine": min_cosine,
        }
        config = check_model(settings)
        with _as_config_errors():
            pinned = pin_model(config, Mirror(StoreOptions.from_environment()))
        return cls(pinned, decode, limits)

    @property
    def width(self) -> int:
        """The number of dimensions D of an embedding."""
        return self._encoder.width

    def images(self, images: Iterable[ImageInput]) -> Floats:
        """Embed images: float32 (N, D), each row of unit norm.

        Each image is the path of a file, the bytes of a file, a Pillow image, or RGB pixels as uint8 (H, W, 3). They
        are decoded and embedded a batch at a time, so the decoded images of all N are never in memory at once. EXIF
        orientation is applied to files and to Pillow images.

        Raises `ImageRejected` for the first image that cannot be read or decoded. Its `index` says which image it is,
        `reason` is one of the batch job's reasons, and `detail` explains it. Raises `TypeError` for other objects, and
        for an array of another shape or dtype.
        """
        shape, at_once = self._pinned.spec.shape, self._encoder.batch_size
        found = [np.zeros((0, self.width), np.float32)]
        batch: list[NDArray[np.uint8]] = []
        for index, image in enumerate(images):
            try:
                batch.append(self._prepare(image))
            except ImageRejected as rejected:
                rejected.index = index
                raise
            except TypeError as error:
                raise TypeError(f"image {index}: {error}") from None
            if len(batch) == at_once:
                found.append(self._encoder.embed_images(np.stack(batch)))
                batch.clear()
        found.append(self._encoder.embed_images(np.array(batch, np.uint8).reshape(-1, *shape)))
        return np.concatenate(found)

    def texts(self, texts: Sequence[str]) -> Floats:
        """Embed texts as they are, without a template: float32 (N, D), each row of unit norm.

        A text is cut off at the model's length (64 tokens for most checkpoints). Raises `TypeError` for a bare string.
        """
        if isinstance(texts, str):
            raise TypeError("texts: expected a list of strings, such as ['a red car']")
        return self._encoder.embed_texts(list(texts))

    def head(self, labels: LabelSet | Sequence[str]) -> LinearHead:
        """Embed labels, and return a linear head that scores any number of image embeddings.

        For example `encoder.head(labels).scores(encoder.images(images))`. Label names get the default prompt template,
        as in a job without `templates`. Raises `ConfigError` if two labels are the same text to the model.
        """
        try:
            found = labels if isinstance(labels, LabelSet) else LabelSet.model_validate(list(labels))
        except ValidationError as error:
            raise ConfigError(f"labels: {describe_error(error, LabelSet)}") from None
        with _as_config_errors():
            return build_head(found, self._encoder.embed_labels(found), self._encoder.scale, self._pinned.identity)

    def scores(self, images: Iterable[ImageInput], labels: LabelSet | Sequence[str]) -> Floats:
        """Score images against labels: probabilities, float32 (N, L).

        Each score is independent of the other labels, except within one of the label set's `groups`, whose scores add
        up to 1. Thresholds and `top_k` are not applied. Embeds the labels in each call: see `head` to score many lists
        of images. Raises what `images` and `head` raise.
        """
        head = self.head(labels)
        return head.scores(self.images(images))

    def _prepare(self, image: ImageInput) -> NDArray[np.uint8]:
        """Return what the model sees, uint8 of the spec's `shape`.

        Raises `ImageRejected`, and `TypeError` for what is no image.
        """
        spec = self._pinned.spec
        if isinstance(image, Image.Image):
            return resize_image(image, spec)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
                raise TypeError(f"expected uint8 (H, W, 3), not {image.dtype} {image.shape}")
            return resize_image(Image.fromarray(image), spec)
        if isinstance(image, (str, PathLike)):
            image = _read(Path(image))
        if not isinstance(image, bytes):
            raise TypeError(f"expected a path, bytes, a Pillow image or an array, not {type(image).__name__}")
        return decode_image(image, spec, self._limits, self._decode).pixels


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageRejected("missing", f"{path} does not exist") from None
    except OSError as error:
        raise ImageRejected("unreadable", f"{path}: {error.strerror or error}") from None


@contextmanager
def _as_config_errors() -> Iterator[None]:
    """Raise `ConfigError` for what the user must change: the checkpoint, the device, the labels or the store."""
    try:
        yield
    except (CheckpointError, LabelError, StoreError) as error:
        raise ConfigError(str(error)) from error
