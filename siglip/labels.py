"""Label sets: labels, their thresholds, and the exact prompts that the model embeds for them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from siglip.label_files import read_label_file
from siglip.label_text.characters import find_invisible, make_appearance
from siglip.label_text.fitted import Calibration, Probe
from siglip.label_text.values import Count, Share, Text

DEFAULT_TEMPLATE = "This is a photo of {label}."
"""The template of transformers' zero-shot-image-classification pipeline, so that scores are comparable."""
_NULLS = ("", "~", "null", "Null", "NULL")


class TextRule(Protocol):
    """The rule by which a family of checkpoints prepares texts: see `siglip.families`."""

    def canonicalize(self, text: str) -> str:
        """The text in the form that the tokenizer gets. Empty when no character remains."""


class LabelError(ValueError):
    """A label set that cannot be used with a model, such as two labels with the same text. The message is one line.

    `what` is the problem, and `fix` what the author of a label set changes.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what, fix)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}: {self.fix}" if self.fix else self.what


class Label(BaseModel):
    """One label: its name in the output, and optionally its prompts or probe, threshold and calibration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Text = Field(min_length=1, description="Name in the output.")
    prompts: tuple[Text, ...] = Field((), description="Texts that replace the templates; several are averaged.")
    threshold: Share | None = Field(None, description="Replaces the label set's threshold for this label.")
    accept: Share | None = Field(
        None,
        description="Lowest score of the band `accept`. Scores from the threshold up to it are in the band `review`.",
    )
    calibration: Calibration | None = Field(None, description="Scale and bias of the label's logit.")
    probe: Probe | None = Field(None, description="Linear probe on embeddings, instead of prompts.")
    chosen_by: Text | None = Field(None, description="Fingerprint of the answers that chose `accept`.")
    trained_by: Text | None = Field(None, description="Fingerprint of the answers that trained the probe.")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        """Accept a name. Another scalar is refused, because its text is lost: 1.1 may have been written 1.10."""
        if value == "":
            raise ValueError("an empty label: in YAML a # begins a comment, so write a label that contains # in quotes")
        if isinstance(value, str):
            return {"name": value}
        if not isinstance(value, (dict, Label)):
            raise ValueError(f"label {value!r} is not text: write it in quotes")
        if isinstance(value, dict) and "name" not in value:
            raise ValueError(f"label {value!r} has no name: write a label with a colon or braces in quotes")
        return _without_nulls(value, ("threshold", "accept", "calibration", "probe", "chosen_by", "trained_by"))


class LabelSet(BaseModel):
    """Labels, the templates that turn them into prompts, and the rule for which scores are written.

    SigLIP's scores are independent probabilities, and usually low: 0.1 to 0.5 for a correct label. A threshold is
    therefore specific to a label set and a model. Choose it on your own images.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    shorthand: ClassVar[str] = "names"
    """The key that a bare list or path stands for where a label set is expected."""
    text_only: ClassVar[bool] = True
    """YAML's scalars are read as the text that stands there: see `storage.settings`."""

    names: tuple[Label, ...] = Field(
        min_length=1, description="Label names, or mappings {name, prompts, threshold}, or the path of a file of them."
    )
    templates: tuple[Text, ...] = Field(
        (DEFAULT_TEMPLATE,), min_length=1, description="Prompts that contain {label} (or {}); several are averaged."
    )
    threshold: Share = Field(0.0, description="Labels with a lower score are not written.")
    top_k: Count | None = Field(5, description="At most this many labels for each image, best first; null for all.")
    groups: dict[Text, tuple[Text, ...]] = Field(
        {}, description="Groups by name: labels of which exactly one is true. The scores of a group add up to 1."
    )

    @classmethod
    def expand(cls, value: Any) -> Any:
        """Write out a short notation, and the content of a label file, as the mapping of a label set's keys.

        Keys that stand beside a file's path win over those in the file. Does not check names or numbers. Raises
        `ValueError` for a file that cannot be read.
        """
        if isinstance(value, str) and value not in _NULLS:
            value = _read_file(value)
        if isinstance(value, dict) and isinstance(value.get("names"), str) and value["names"] not in _NULLS:
            file = _read_file(value["names"])
            keys = file if isinstance(file, dict) and not _is_numbered(file) else {"names": file}
            value = {**keys, **{k: v for k, v in value.items() if k != "names"}}
        return value if isinstance(value, dict) and not _is_numbered(value) else {"names": value}

    @model_validator(mode="before")
    @classmethod
    def _from_anything(cls, value: Any) -> Any:
        """Accept a list of names, the path of a label file, or the mapping, whose `names` may be such a path.

        A mapping of numbers to names, as YOLO and torchvision write it, is the list of names in the numbers' order.
        """
        if isinstance(value, LabelSet):
            return value
        value = cls.expand(value)
        if value.get("names", ()) in (None, *_NULLS):
            raise ValueError("the key is empty: write a list of labels, or the path of a label file")
        if isinstance(value.get("names"), dict):
            value = {**value, "names": _order_names(value["names"])}
        return _without_nulls(value, ("top_k",), keep=True)

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
                raise ValueError(f"label {label.name!r} has prompts and a probe: give it only one of them")
            threshold = self.threshold if label.threshold is None else label.threshold
            if label.accept is not None and label.accept < threshold:
                raise ValueError(
                    f"label {label.name!r} has accept {label.accept:g}, which is under its threshold {threshold:g}"
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
                    raise ValueError(f"group {group!r} contains {name!r}, which is not a label of this set")
                if name in grouped:
                    raise ValueError(f"label {name!r} is in two groups, or twice in one")
                grouped.add(name)

    def check(self, rule: TextRule) -> None:
        """Raise `LabelError` for a wrong placeholder, and if a model with this text rule cannot tell the labels apart.

        That is so when labels look the same, when no character of a text remains, or when two labels have the same
        texts: `C`, `C++` and `C#` are the same label for a model that sees no punctuation.
        """
        if found := [*self.find_placeholders(), *self.find_lookalikes()]:
            raise LabelError(f"labels: {found[0][0]}")
        seen: dict[tuple[str, ...], str] = {}
        for label, prompts in zip(self.names, self.prompts(rule), strict=True):
            if label.probe is not None:
                continue
            if not label.prompts and not rule.canonicalize(label.name):
                raise LabelError(
                    f"labels: no character of {label.name!r} remains, because this model's texts have no punctuation",
                    "give the label prompts",
                )
            if not all(prompts):
                raise LabelError(f"labels: {label.name!r} has a prompt that is empty without its punctuation")
            other = seen.setdefault(tuple(sorted(set(prompts))), label.name)
            if other != label.name:
                raise LabelError(
                    f"labels: {other!r} and {label.name!r} are the same text to this model, {prompts[0]!r}",
                    "give one of them other prompts",
                )

    def find_lookalikes(self) -> list[tuple[str, tuple[str, ...]]]:
        """Labels that look the same, and texts with invisible characters: a description, and the labels or the text.

        `é` may be one character or two (Unicode's NFC and NFD), which look the same and have other scores. Joiners and
        variation selectors are part of words and emoji, so they are not refused, but two labels must differ in more.
        """
        found: list[tuple[str, tuple[str, ...]]] = []
        texts = [*self.label_names(), *self.groups]
        prompts = [*self.templates, *(prompt for label in self.names for prompt in label.prompts)]
        for text in [*texts, *(re.sub(r"[\t\r\n]", " ", prompt) for prompt in prompts)]:
            if hidden := find_invisible(text):
                found.append((f"{text!a} contains the invisible character U+{ord(hidden):04X}: remove it", (text,)))
        seen: dict[str, str] = {}
        for name in self.label_names():
            other = seen.setdefault(make_appearance(name), name)
            if other != name:
                found.append((f"{other!a} and {name!a} look the same: remove one of them", (other, name)))
        return found

    def find_placeholders(self) -> list[tuple[str, tuple[str, ...]]]:
        """Templates and prompts in which braces would remain as text: a description, and the template or label."""
        found: list[tuple[str, tuple[str, ...]]] = []
        for template in self.templates:
            if re.search(r"[{}]", fill(template, "")):
                what = f"template {template!r} has other braces than {{label}}: write only this placeholder"
                found.append((what, (template,)))
        for label in self.names:
            if wrong := next((text for text in label.prompts if "{label}" in text or "{}" in text), None):
                what = f"prompt {wrong!r} has a placeholder, and prompts are used as they stand: write out the label"
                found.append((what, (label.name,)))
        return found

    def label_names(self) -> list[str]:
        """The names, in order. Row i of the text embeddings belongs to name i."""
        return [label.name for label in self.names]

    def prompts(self, rule: TextRule) -> list[list[str]]:
        """For each label the prompts that are embedded and averaged, in the form of the model's text rule.

        A label with a probe has no prompts.
        """
        return [
            [rule.canonicalize(prompt) for prompt in label.prompts or (fill(t, label.name) for t in self.templates)]
            if label.probe is None
            else []
            for label in self.names
        ]

    def thresholds(self) -> list[float]:
        """For each label the score that it must reach to be written."""
        return [self.threshold if label.threshold is None else label.threshold for label in self.names]

    def accepts(self) -> list[float | None]:
        """For each label its `accept` value, or None. If all are None, this set has no bands."""
        return [label.accept for label in self.names]

    def has_bands(self) -> bool:
        """Whether any label has an `accept` value."""
        return any(label.accept is not None for label in self.names)

    def positions(self, names: Sequence[str]) -> tuple[int, ...]:
        """The indices of these labels in this set."""
        where = {label.name: index for index, label in enumerate(self.names)}
        return tuple(where[name] for name in names)

    def digest(self, rule: TextRule) -> str:
        """Hex SHA-256 of everything that changes scores: names, canonical prompts, probes, calibrations and groups."""
        parts: list[Any] = [self.label_names(), self.prompts(rule)]
        if self.groups or any(label.calibration or label.probe for label in self.names):
            settings: Any = {"probe": True, "calibration": {"scale", "bias"}}
            parts.append([label.model_dump(include=settings) for label in self.names])
            parts.append([sorted(self.positions(members)) for members in self.groups.values()])
        content = json.dumps(parts, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()


def _read_file(name: str) -> Any:
    if len(name.splitlines()) > 1:
        raise ValueError("the text has several lines: write a list of labels, or the path of a label file")
    return read_label_file(Path(name))


def fill(template: str, label: str) -> str:
    """Put a label into a template. `str.format` is not used, because braces in a label have no meaning."""
    return template.replace("{label}" if "{label}" in template else "{}", label)


def _is_numbered(value: Any) -> bool:
    """Whether a value is a mapping whose keys are all numbers: text, or integers that a YAML loader made of them."""
    return isinstance(value, dict) and bool(value) and all(re.fullmatch(r"\d+", str(key)) for key in value)


def _order_names(names: dict[Any, Any]) -> list[Any]:
    """The names of a mapping of numbers to names, in the numbers' order. Raises `ValueError` for another mapping."""
    if not _is_numbered(names) or len({int(key) for key in names}) < len(names):
        raise ValueError("names is a mapping: write a list of labels, or a mapping of numbers to labels")
    return [names[key] for key in sorted(names, key=int)]


def _without_nulls(value: Any, keys: Sequence[str], keep: bool = False) -> Any:
    """Read YAML's notations of null, which are text here, as None where a key may be null.

    Such keys are removed, because null is their default, or kept as None with `keep`.
    """
    if not isinstance(value, dict):
        return value
    null = [key for key in keys if value.get(key) in _NULLS]
    return {**{k: v for k, v in value.items() if k not in null}, **(dict.fromkeys(null) if keep else {})}
