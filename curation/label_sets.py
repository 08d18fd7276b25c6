"""Label sets looked at before they cost anything: what a model cannot tell apart or never sees, and what changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from siglip.labels import Label, LabelSet, TextRule, fill
from siglip.scoring import Floats, average_prompts

Problem = Literal["nothing left", "same text", "cut off", "nearly the same"]


@dataclass(frozen=True)
class Finding:
    """Something about one label, or about several together. `fatal` is what a job or the endpoint would refuse."""

    problem: Problem
    labels: tuple[str, ...]
    detail: str

    @property
    def fatal(self) -> bool:
        """Whether a run with this label set would not begin."""
        return self.problem in ("nothing left", "same text")


class TextModel(Protocol):
    """`siglip.encoder.Encoder`, as far as labels go."""

    text_length: int

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Each text's tokens, however long it is."""

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        """Texts to float32 (N, D) of unit norm."""


def check_labels(labels: LabelSet, rule: TextRule, model: TextModel, near: float) -> list[Finding]:
    """All that is wrong with a label set for a model, in the set's order.

    *nothing left*: a name or prompt that is empty without punctuation. *same text*: labels that are asked with the same
    prompts. *cut off*: a prompt longer than the model's text, with what it has too many. *nearly the same*: labels
    whose embeddings have a cosine of at least `near`, nearest first; their scores will hardly differ, whatever the
    image. Two labels that a person would call the same may lie far apart, which this does not see.
    """
    prompts = labels.prompts(rule)
    findings = _find_empty(labels, rule, prompts)
    empty = {name for finding in findings for name in finding.labels}
    asked = [
        (name, group) for name, group in zip(labels.label_names(), prompts, strict=True) if group and name not in empty
    ]
    findings += [*_find_doubles(asked), *_find_long(asked, model)]
    if len(asked) > 1:
        vectors = model.embed_texts([prompt for _, group in asked for prompt in group])
        texts = average_prompts(vectors, [len(group) for _, group in asked])
        same = {finding.labels for finding in findings if finding.problem == "same text"}
        findings += _find_near([name for name, _ in asked], texts, near, same)
    return findings


def _find_empty(labels: LabelSet, rule: TextRule, prompts: list[list[str]]) -> list[Finding]:
    found = []
    for label, group in zip(labels.names, prompts, strict=True):
        if label.probe is not None:
            continue
        if not all(group) or not (label.prompts or rule.canonicalize(label.name)):
            detail = "the model sees no punctuation, and nothing else is in it: give it prompts of its own"
            found.append(Finding("nothing left", (label.name,), detail))
    return found


def _find_doubles(asked: list[tuple[str, list[str]]]) -> list[Finding]:
    names: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, group in asked:
        names[tuple(sorted(set(group)))].append(name)
    return [
        Finding("same text", tuple(alike), f"to the model all of them are {group[0]!r}")
        for group, alike in names.items()
        if len(alike) > 1
    ]


def _find_long(asked: list[tuple[str, list[str]]], model: TextModel) -> list[Finding]:
    found = []
    for name, group in asked:
        longest = int(model.count_tokens(group).max())
        if longest > model.text_length:
            detail = f"a prompt has {longest} tokens, and the model reads {model.text_length}"
            found.append(Finding("cut off", (name,), detail))
    return found


def _find_near(names: list[str], texts: Floats, near: float, same: set[tuple[str, ...]]) -> list[Finding]:
    found: list[tuple[float, Finding]] = []
    for first in range(len(names) - 1):  # a row at a time: ten thousand labels have fifty million pairs
        cosines = texts[first + 1 :] @ texts[first]
        for offset in np.flatnonzero(cosines >= near):
            pair = names[first], names[first + 1 + int(offset)]
            if not any(set(pair) <= set(group) for group in same):
                cosine = float(cosines[offset])
                found.append((cosine, Finding("nearly the same", pair, f"their texts' cosine is {cosine:.4f}")))
    return [finding for _, finding in sorted(found, key=lambda item: -item[0])]


@dataclass(frozen=True)
class Change:
    """A label that two label sets do not have alike. `scores`: whether its scores change, or only what is written."""

    label: str
    what: str
    scores: bool


def diff_labels(before: LabelSet, after: LabelSet) -> list[Change]:
    """What changed between two label sets: labels removed, labels added, and those that are asked or cut otherwise.

    Prompts are compared as they are written: two that a model sees alike are said to differ.
    """
    old = {label.name: label for label in before.names}
    new = {label.name: label for label in after.names}
    changes = [Change(name, "removed", True) for name in old if name not in new]
    changes += [Change(name, "added", True) for name in new if name not in old]
    for name, label in new.items():
        if name not in old:
            continue
        was, now = _written(before, old[name]), _written(after, label)
        if was != now:
            changes.append(Change(name, f"prompts: {_quote(was)} became {_quote(now)}", True))
        for what in ("calibration", "probe"):
            if getattr(old[name], what) != getattr(label, what):
                changes.append(Change(name, f"{what}: {_change(old[name], label, what)}", True))
        groups = _group(before, name), _group(after, name)
        if groups[0] != groups[1]:
            changes.append(Change(name, f"group: {_list(groups[0])} became {_list(groups[1])}", True))
        first, second = _threshold(before, old[name]), _threshold(after, label)
        if first != second:
            changes.append(Change(name, f"threshold: {first:g} became {second:g}", False))
        if old[name].accept != label.accept:
            was_sure, is_sure = (f"{bar:g}" if bar is not None else "none" for bar in (old[name].accept, label.accept))
            changes.append(Change(name, f"accept: {was_sure} became {is_sure}", False))
    return changes


def _change(was: Label, now: Label, what: str) -> str:
    if getattr(was, what) is None:
        return "added"
    return "removed" if getattr(now, what) is None else "another"


def _group(labels: LabelSet, name: str) -> tuple[str, ...]:
    """The others in a label's group."""
    return next((tuple(sorted(members)) for members in labels.groups.values() if name in members), ())


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"


def _written(labels: LabelSet, label: Label) -> list[str]:
    if label.probe is not None:
        return []
    return list(label.prompts) or [fill(template, label.name) for template in labels.templates]


def _threshold(labels: LabelSet, label: Label) -> float:
    return labels.threshold if label.threshold is None else label.threshold


def _quote(prompts: list[str]) -> str:
    if not prompts:
        return "none"
    more = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
    return f"{prompts[0]!r}{more}"
