"""Label sets: what is asked of an image, and the exact text that the model is asked with."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

DEFAULT_TEMPLATE = "This is a photo of {label}."
"""The template of transformers' zero-shot-image-classification pipeline, so that scores can be compared."""


class TextRule(Protocol):
    """How a family of checkpoints wants its texts: see `siglip.families`."""

    def canonicalize(self, text: str) -> str:
        """The text as the tokenizer is to see it; empty when nothing of it is left."""


class LabelError(ValueError):
    """Labels that a model cannot tell apart, or cannot be asked. The message is one line."""


class Calibration(BaseModel):
    """Platt's scaling of a label's logit, as `sightline calibrate` finds it: `scale * logit + bias`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: float = Field(gt=0, allow_inf_nan=False, description="Times the logit.")
    bias: float = Field(allow_inf_nan=False, description="Added to it.")


class Probe(BaseModel):
    """A logistic regression on embeddings, as `sightline probe` trains it: what a label is asked with, without prompts.

    The logit is `weights . embedding + bias`. Good for the embeddings of one model alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="Digest of the model whose embeddings it was trained on.")
    weights: str = Field(description="Base64 of little-endian float32, one for each dimension of the embedding.")
    bias: float = Field(allow_inf_nan=False, description="Added to the product.")

    @field_validator("weights")
    @classmethod
    def _check(cls, value: str) -> str:
        try:
            vector = np.frombuffer(base64.b64decode(value, validate=True), "<f4")
        except ValueError:
            raise ValueError("a probe's weights are no base64 of float32") from None
        if not len(vector) or not np.isfinite(vector).all() or not vector.any():
            raise ValueError("a probe's weights are nothing but zeros, or not finite")
        return value

    @classmethod
    def of(cls, vector: NDArray[np.float32], bias: float, model: str) -> Probe:
        """A probe of weights (D,)."""
        return cls(model=model, weights=base64.b64encode(vector.astype("<f4").tobytes()).decode(), bias=bias)

    def vector(self) -> NDArray[np.float32]:
        """The weights, float32 (D,)."""
        return np.frombuffer(base64.b64decode(self.weights), "<f4").astype(np.float32)

    @property
    def width(self) -> int:
        """D, the embedding's dimensions."""
        return len(base64.b64decode(self.weights)) // 4


class Label(BaseModel):
    """One label: the name that is written out, and optionally how it is asked and from which score it counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="What is written out.")
    prompts: tuple[str, ...] = Field((), description="Asked instead of the templates; several are averaged.")
    threshold: float | None = Field(None, ge=0, le=1, description="Replaces the set's threshold for this label.")
    accept: float | None = Field(
        None,
        ge=0,
        le=1,
        description="From this score on it is sure: band accept; below, down to the threshold, review.",
    )
    calibration: Calibration | None = Field(None, description="Scale and bias of its logit.")
    probe: Probe | None = Field(None, description="A regression on embeddings, instead of prompts.")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": str(value)} if isinstance(value, (str, int, float)) else value


class LabelSet(BaseModel):
    """Labels, the templates that turn them into prompts, and which scores are worth writing down.

    SigLIP's scores are independent probabilities that run low: 0.1 to 0.5 is usual for a right label. A threshold
    therefore belongs to a label set and a model, and is to be chosen on the user's own images.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    shorthand: ClassVar[str] = "names"
    """What a list or a path stands for where a label set is expected."""

    names: tuple[Label, ...] = Field(
        min_length=1, description="Label names, or {name, prompts, threshold}; or the path of a file with them."
    )
    templates: tuple[str, ...] = Field(
        (DEFAULT_TEMPLATE,), min_length=1, description="Prompts with {label} (or {}) in them; several are averaged."
    )
    threshold: float = Field(0.0, ge=0, le=1, description="Labels that score less are not written.")
    top_k: int | None = Field(5, gt=0, description="At most this many labels an image, best first; null for all.")
    groups: dict[str, tuple[str, ...]] = Field(
        {}, description="By a name of your own, labels of which exactly one is true: their scores add up to 1."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_anything(cls, value: Any) -> Any:
        """A list of names, a path of a YAML or text file, or the mapping itself, whose names may be such a path."""
        if isinstance(value, str):
            return _read_file(Path(value))
        if isinstance(value, dict) and isinstance(value.get("names"), str):
            return {**_read_file(Path(value["names"])), **{k: v for k, v in value.items() if k != "names"}}
        return {"names": value} if isinstance(value, (list, tuple)) else value

    @model_validator(mode="after")
    def _check(self) -> LabelSet:
        for template in self.templates:
            if "{label}" not in template and "{}" not in template:
                raise ValueError(f"template {template!r} has no {{label}} in it")
        seen: set[str] = set()
        for label in self.names:
            if label.name in seen:
                raise ValueError(f"label {label.name!r} is listed twice")
            seen.add(label.name)
            if not label.name.strip() or not all(prompt.strip() for prompt in label.prompts):
                raise ValueError(f"label {label.name!r} has an empty name or prompt")
            if label.probe is not None and label.prompts:
                raise ValueError(f"label {label.name!r} has prompts and a probe: it is asked with one of them")
            threshold = self.threshold if label.threshold is None else label.threshold
            if label.accept is not None and label.accept < threshold:
                raise ValueError(
                    f"label {label.name!r} is sure from {label.accept:g}, under its threshold {threshold:g}"
                )
        self._check_groups(seen)
        return self

    def _check_groups(self, names: set[str]) -> None:
        grouped: set[str] = set()
        for group, members in self.groups.items():
            if len(members) < 2:
                raise ValueError(f"group {group!r} has fewer than two labels")
            for name in members:
                if name not in names:
                    raise ValueError(f"group {group!r} has {name!r} in it, which is no label of this set")
                if name in grouped:
                    raise ValueError(f"label {name!r} is in two groups, or twice in one")
                grouped.add(name)

    def check(self, rule: TextRule) -> None:
        """Whether a model with these text rules can tell the labels apart.

        Raises `LabelError` when nothing is left of a text, or when two labels are asked with the same texts: `C`, `C++`
        and `C#` are one label to a model that sees no punctuation.
        """
        asked: dict[tuple[str, ...], str] = {}
        for label, prompts in zip(self.names, self.prompts(rule), strict=True):
            if label.probe is not None:
                continue
            if not label.prompts and not rule.canonicalize(label.name):
                raise LabelError(
                    f"labels: nothing is left of {label.name!r}, because this model's texts have no punctuation: "
                    "give it prompts of its own"
                )
            if not all(prompts):
                raise LabelError(f"labels: {label.name!r} has a prompt of which nothing is left without punctuation")
            other = asked.setdefault(tuple(sorted(set(prompts))), label.name)
            if other != label.name:
                raise LabelError(
                    f"labels: {other!r} and {label.name!r} are the same text to this model, {prompts[0]!r}: "
                    "give one of them prompts of its own"
                )

    def label_names(self) -> list[str]:
        """The names, in order: row i of the text embeddings belongs to name i."""
        return [label.name for label in self.names]

    def prompts(self, rule: TextRule) -> list[list[str]]:
        """For each label the prompts that are embedded and averaged, as the model's text rules want them.

        A label with a probe has none.
        """
        return [
            [rule.canonicalize(prompt) for prompt in label.prompts or (fill(t, label.name) for t in self.templates)]
            if label.probe is None
            else []
            for label in self.names
        ]

    def thresholds(self) -> list[float]:
        """For each label the score it must reach."""
        return [self.threshold if label.threshold is None else label.threshold for label in self.names]

    def accepts(self) -> list[float | None]:
        """For each label the score from which it is sure, if it has one. All None: this set has no bands."""
        return [label.accept for label in self.names]

    def has_bands(self) -> bool:
        """Whether any label says from which score it is sure."""
        return any(label.accept is not None for label in self.names)

    def positions(self, names: Sequence[str]) -> tuple[int, ...]:
        """The indices of labels of this set."""
        where = {label.name: index for index, label in enumerate(self.names)}
        return tuple(where[name] for name in names)

    def digest(self, rule: TextRule) -> str:
        """Hex SHA-256 over what decides the scores: names, canonical prompts, probes, calibrations and groups."""
        parts: list[Any] = [self.label_names(), self.prompts(rule)]
        if self.groups or any(label.calibration or label.probe for label in self.names):
            parts.append([label.model_dump(include={"calibration", "probe"}) for label in self.names])
            parts.append([sorted(self.positions(members)) for members in self.groups.values()])
        content = json.dumps(parts, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()


def fill(template: str, label: str) -> str:
    """Put a label into a template. Braces in a label mean nothing, so this is no `str.format`."""
    return template.replace("{label}" if "{label}" in template else "{}", label)


def _read_file(path: Path) -> dict[str, Any]:
    """A label set from YAML (list or mapping), or from a text file with one label a line."""
    if not path.is_file():
        raise ValueError(f"label file {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
        value = yaml.safe_load(text) if path.suffix.lower() in (".yaml", ".yml") else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"label file {path} cannot be read: {reason}") from None
    if path.suffix.lower() in (".yaml", ".yml"):
        if not isinstance(value, (dict, list)):
            raise ValueError(f"label file {path} holds neither a list of names nor a label set")
        return value if isinstance(value, dict) else {"names": value}
    return {"names": [line.strip() for line in text.splitlines() if line.strip()]}
