"""What is fitted on answers about one label: its calibration and its probe. Both are valid for one model only."""

from __future__ import annotations

import base64

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from siglip.label_text.values import Real


class Calibration(BaseModel):
    """Platt scaling of a label's logit, as `sightline calibrate` fits it: `scale * logit + bias`.

    It is valid for the logits of one model only. A calibration without `model` is used with any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: Real = Field(gt=0, allow_inf_nan=False, description="Factor of the logit.")
    bias: Real = Field(allow_inf_nan=False, description="Added to the scaled logit.")
    # Left out if there is none, so that files and digests of earlier versions stay what they are.
    model: str | None = Field(
        None, exclude_if=lambda model: model is None, description="Digest of the model on whose scores it was fitted."
    )


class Probe(BaseModel):
    """A linear probe: logistic regression on embeddings, as `sightline probe` trains it. It replaces a label's prompts.

    The logit is `weights . embedding + bias`. A probe is valid for the embeddings of one model only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="Digest of the model on whose embeddings the probe was trained.")
    weights: str = Field(description="Base64 of little-endian float32, one for each dimension of the embedding.")
    bias: Real = Field(allow_inf_nan=False, description="Added to the product of weights and embedding.")

    @field_validator("weights")
    @classmethod
    def _check(cls, value: str) -> str:
        try:
            vector = np.frombuffer(base64.b64decode(value, validate=True), "<f4")
        except ValueError:
            raise ValueError("a probe's weights are not base64 of float32") from None
        if not len(vector) or not np.isfinite(vector).all() or not vector.any():
            raise ValueError("a probe's weights are all zero, or not finite")
        return value

    @classmethod
    def of(cls, vector: NDArray[np.float32], bias: float, model: str) -> Probe:
        """A probe with the weights `vector` (D,), for the model with the digest `model`."""
        return cls(model=model, weights=base64.b64encode(vector.astype("<f4").tobytes()).decode(), bias=bias)

    def vector(self) -> NDArray[np.float32]:
        """The weights, float32 (D,)."""
        return np.frombuffer(base64.b64decode(self.weights), "<f4").astype(np.float32)

    @property
    def width(self) -> int:
        """D, the embedding's dimensions."""
        return len(base64.b64decode(self.weights)) // 4
