"""Label sets: what is asked of an image, and the exact text that the model is asked with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Protocol

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

DEFAULT_TEMPLATE = "This is a photo of {label}."
"""The template of transformers' zero-shot-image-classification pipeline, so that scores can be compared."""


class TextRule(Protocol):
    """How a family of checkpoints wants its texts: see `siglip.families`."""

    def canonicalize(self, text: str) -> str:
        """The text as the tokenizer is to see it; empty when nothing of it is left."""


class LabelError(ValueError):
    """Labels that a model cannot tell apart, or cannot be asked. The message is one line."""


class Label(BaseModel):
    """One label: the name that is written out, and optionally its own prompts and threshold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="What is written out.")
    prompts: tuple[str, ...] = Field((), description="Asked instead of the templates; several are averaged.")
    threshold: float | None = Field(None, ge=0, le=1, description="Replaces the set's threshold for this label.")

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
        return self

    def check(self, rule: TextRule) -> None:
        """Whether a model with these text rules can tell the labels apart.

        Raises `LabelError` when nothing is left of a text, or when two labels are asked with the same texts: `C`, `C++`
        and `C#` are one label to a model that sees no punctuation.
        """
        asked: dict[tuple[str, ...], str] = {}
        for label, prompts in zip(self.names, self.prompts(rule), strict=True):
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
        """For each label the prompts that are embedded and averaged, as the model's text rules want them."""
        return [
            [rule.canonicalize(prompt) for prompt in label.prompts or (fill(t, label.name) for t in self.templates)]
            for label in self.names
        ]

    def thresholds(self) -> list[float]:
        """For each label the score it must reach."""
        return [self.threshold if label.threshold is None else label.threshold for label in self.names]

    def digest(self, rule: TextRule) -> str:
        """Hex SHA-256 over what decides the scores: names and canonical prompts, in order."""
        content = json.dumps([self.label_names(), self.prompts(rule)], ensure_ascii=False)
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
