"""Checks of a label set against a model before a run, and diffs of two label sets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from siglip.label_text.tokens import UNKNOWN, LabelReadings
from siglip.labels import Label, LabelSet, TextRule, fill
from siglip.scoring import Floats, average_prompts

Problem = Literal[
    "placeholder",
    "look-alike",
    "empty prompt",
    "same prompts",
    "unreadable",
    "same tokens",
    "unknown characters",
    "too long",
    "near duplicate",
]
FATAL: tuple[Problem, ...] = (
    "placeholder",
    "look-alike",
    "empty prompt",
    "same prompts",
    "unreadable",
    "same tokens",
)


@dataclass(frozen=True)
class Finding:
    """A problem of one label, or of several labels together."""

    problem: Problem
    labels: tuple[str, ...]
    detail: str

    @property
    def fatal(self) -> bool:
        """Whether a job and the endpoint refuse to start with this label set."""
        return self.problem in FATAL


class TextModel(Protocol):
    """The part of `siglip.encoder.Encoder` that the checks use."""

    text_length: int

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """The number of tokens of each text (N,), without truncation."""

    def read_labels(self, labels: LabelSet) -> LabelReadings:
        """What the model reads of a label set's prompts."""

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        """Embed texts: float32 (N, D) of unit norm."""


def check_labels(labels: LabelSet, rule: TextRule, model: TextModel, near: float) -> list[Finding]:
    """Find the problems of a label set for a model.

    * *placeholder*: a template or prompt in which braces would remain as text.
    * *look-alike*: labels that look the same, and labels with invisible characters.
    * *empty prompt*: a name or prompt that is empty after the model's text rule has removed punctuation.
    * *same prompts*: labels with the same prompts.
    * *unreadable*: a name or prompt of which the model's tokenizer knows no character.
    * *same tokens*: labels that differ only in what the model does not read: what is cut off, unknown characters.
    * *unknown characters*: a prompt of which the tokenizer does not know all characters.
    * *too long*: a prompt with more tokens than the model reads; the rest is cut off.
    * *near duplicate*: labels whose embeddings have a cosine of at least `near`, nearest first. Their scores hardly
      differ for any image.

    Does not find synonyms: two labels that mean the same to a person may have distant embeddings.
    """
    prompts = labels.prompts(rule)
    findings = [Finding("placeholder", texts, what) for what, texts in labels.find_placeholders()]
    findings += [Finding("look-alike", names, what) for what, names in labels.find_lookalikes()]
    findings += _find_empty(labels, rule, prompts)
    empty = {name for finding in findings if finding.problem == "empty prompt" for name in finding.labels}
    prompted = [
        (name, group) for name, group in zip(labels.label_names(), prompts, strict=True) if group and name not in empty
    ]
    findings += _find_same_prompts(prompted)
    readings = model.read_labels(labels)
    findings += [*_find_unread(readings, findings), *_find_too_long(prompted, readings, model)]
    if len(prompted) > 1:
        vectors = model.embed_texts([prompt for _, group in prompted for prompt in group])
        texts = average_prompts(vectors, [len(group) for _, group in prompted])
        same = {finding.labels for finding in findings if finding.problem in ("same prompts", "same tokens")}
        findings += _find_near_duplicates([name for name, _ in prompted], texts, near, same)
    return findings


def _find_empty(labels: LabelSet, rule: TextRule, prompts: list[list[str]]) -> list[Finding]:
    found = []
    for label, group in zip(labels.names, prompts, strict=True):
        if label.probe is not None:
            continue
        if not all(group) or not (label.prompts or rule.canonicalize(label.name)):
            detail = "the model ignores punctuation, and the text has nothing else: write other prompts for this label"
            found.append(Finding("empty prompt", (label.name,), detail))
    return found


def _find_same_prompts(prompted: list[tuple[str, list[str]]]) -> list[Finding]:
    names: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, group in prompted:
        names[tuple(sorted(set(group)))].append(name)
    return [
        Finding("same prompts", tuple(alike), f"the model reads all of them as {group[0]!r}")
        for group, alike in names.items()
        if len(alike) > 1
    ]


def _find_unread(readings: LabelReadings, found: Sequence[Finding]) -> Iterator[Finding]:
    """What the tokenizer does not read, except in labels that are among the fatal findings already."""
    known = {name for finding in found if finding.fatal for name in finding.labels}
    unreadable = [name for name in readings.find_unreadable() if name not in known]
    for name in unreadable:
        yield Finding("unreadable", (name,), f"{UNKNOWN}: write prompts in a language of the model for this label")
    known.update(unreadable)
    for names in readings.find_same():
        if not known.issuperset(names):
            detail = "they differ only in characters that the model cuts off or does not know"
            yield Finding("same tokens", names, detail)
    for name in readings.find_partly_read():
        if name not in known:
            detail = "the model's tokenizer does not know all characters of a prompt: they are read as unknown"
            yield Finding("unknown characters", (name,), detail)


def _find_too_long(prompted: list[tuple[str, list[str]]], readings: LabelReadings, model: TextModel) -> list[Finding]:
    found = []
    cut = set(readings.find_cut(model.text_length))
    for name, group in prompted:
        if name in cut:
            longest = int(model.count_tokens(group).max())
            detail = f"a prompt has {longest} tokens, but the model reads {model.text_length}"
            found.append(Finding("too long", (name,), detail))
    return found


def _find_near_duplicates(names: list[str], texts: Floats, near: float, same: set[tuple[str, ...]]) -> list[Finding]:
    found: list[tuple[float, Finding]] = []
    for first in range(len(names) - 1):  # row by row, because ten thousand labels have fifty million pairs
        cosines = texts[first + 1 :] @ texts[first]
        for offset in np.flatnonzero(cosines >= near):
            pair = names[first], names[first + 1 + int(offset)]
            if not any(set(pair) <= set(group) for group in same):
                cosine = float(cosines[offset])
                found.append(
                    (cosine, Finding("near duplicate", pair, f"the cosine of their text embeddings is {cosine:.4f}"))
                )
    return [finding for _, finding in sorted(found, key=lambda item: -item[0])]


@dataclass(frozen=True)
class Change:
    """A difference of one label between two label sets.

    `scores` is True when the label's scores change, and False when only the labels and bands that are written change.
    """

    label: str
    what: str
    scores: bool


def diff_labels(before: LabelSet, after: LabelSet) -> list[Change]:
    """List what changed between two label sets: labels removed or added, then labels with other settings.

    Prompts are compared as written: two prompts that a model reads as the same text count as different.
    """
    old = {label.name: label for label in before.names}
    new = {label.name: label for label in after.names}
    changes = [Change(name, "removed", True) for name in old if name not in new]
    changes += [Change(name, "added", True) for name in new if name not in old]
    for name, label in new.items():
        if name not in old:
            continue
        was, now = _prompts(before, old[name]), _prompts(after, label)
        if was != now:
            changes.append(Change(name, f"prompts: {_summarize(was)} became {_summarize(now)}", True))
        for what in ("calibration", "probe"):
            if getattr(old[name], what) != getattr(label, what):
                changes.append(Change(name, f"{what}: {_describe_change(old[name], label, what)}", True))
        groups = _group_members(before, name), _group_members(after, name)
        if groups[0] != groups[1]:
            changes.append(Change(name, f"group: {_join(groups[0])} became {_join(groups[1])}", True))
        first, second = _threshold(before, old[name]), _threshold(after, label)
        if first != second:
            changes.append(Change(name, f"threshold: {first:g} became {second:g}", False))
        if old[name].accept != label.accept:
            first_accept, second_accept = (
                f"{accept:g}" if accept is not None else "none" for accept in (old[name].accept, label.accept)
            )
            changes.append(Change(name, f"accept: {first_accept} became {second_accept}", False))
    return changes


def _describe_change(was: Label, now: Label, what: str) -> str:
    if getattr(was, what) is None:
        return "added"
    return "removed" if getattr(now, what) is None else "changed"


def _group_members(labels: LabelSet, name: str) -> tuple[str, ...]:
    """All labels of the label's group, sorted. Empty when the label is in no group."""
    return next((tuple(sorted(members)) for members in labels.groups.values() if name in members), ())


def _join(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"


def _prompts(labels: LabelSet, label: Label) -> list[str]:
    if label.probe is not None:
        return []
    return list(label.prompts) or [fill(template, label.name) for template in labels.templates]


def _threshold(labels: LabelSet, label: Label) -> float:
    return labels.threshold if label.threshold is None else label.threshold


def _summarize(prompts: list[str]) -> str:
    if not prompts:
        return "none"
    more = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
    return f"{prompts[0]!r}{more}"
