"""What a model's tokenizer reads of texts, and which labels it cannot read or tell apart.

Imports neither torch nor a tokenizer: an ingress of the endpoint gets the readings from the model's process.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from siglip.labels import LabelError, LabelSet, TextRule

SHOWN = 5
"""Labels that one message names."""
UNKNOWN = "the model's tokenizer knows none of its characters"


class Reading(NamedTuple):
    """What a tokenizer read of a text.

    `tokens` is their number with the end token; a number above the model's text length says only that the text
    was cut. Of the tokens after the cut, `known` stand for characters, and `unknown` for characters that the vocabulary
    lacks; neither counts special tokens or white space. `digest` is equal for texts with the same tokens after the cut,
    which have the same embedding.
    """

    tokens: int
    known: int
    unknown: int
    digest: bytes


class LabelReadings:
    """What a tokenizer read of a label set's prompts: `readings` are those of `LabelSet.prompts`, one after another.

    A template brings known tokens into the prompt of every label. So the names of `list_doubtful` have to be read on
    their own, and given to `add_names`, before the other methods are called. Labels with a probe have no prompts and no
    problems.
    """

    def __init__(self, labels: LabelSet, rule: TextRule, readings: Sequence[Reading]) -> None:
        left = iter(readings)
        self._labels = labels.names
        self._prompts = [[next(left) for _ in group] for group in labels.prompts(rule)]
        self._rule = rule
        self._doubtful = [
            row
            for row, (label, prompts) in enumerate(zip(self._labels, self._prompts, strict=True))
            if not label.prompts and any(one.unknown for one in prompts)
        ]
        self._names: dict[int, Reading] = {}

    def list_doubtful(self) -> list[str]:
        """The names, in canonical form, of labels in whose prompts some token is unknown. Usually there is none."""
        return [self._rule.canonicalize(self._labels[row].name) for row in self._doubtful]

    def add_names(self, readings: Sequence[Reading]) -> None:
        """Take the readings of the names that `list_doubtful` returns, in its order."""
        self._names = dict(zip(self._doubtful, readings, strict=True))

    def find_unreadable(self) -> list[str]:
        """Labels of whose name, or of one of whose own prompts, the tokenizer knows no character.

        All such texts have nearly the same embedding, so the scores say nothing about the label.
        """
        found = []
        for row, (label, prompts) in enumerate(zip(self._labels, self._prompts, strict=True)):
            texts = prompts if label.prompts else [self._names[row]] if row in self._names else []
            if any(one.unknown and not one.known for one in texts):
                found.append(label.name)
        return found

    def find_same(self) -> Iterator[tuple[str, ...]]:
        """Groups of labels whose prompts have the same tokens after the cut, and therefore always the same scores."""
        names: dict[tuple[bytes, ...], list[str]] = defaultdict(list)
        for label, prompts in zip(self._labels, self._prompts, strict=True):
            if prompts:
                names[tuple(sorted({one.digest for one in prompts}))].append(label.name)
        return (tuple(alike) for alike in names.values() if len(alike) > 1)

    def find_cut(self, length: int) -> list[str]:
        """Labels with a prompt of more than `length` tokens, the model's text length."""
        both = zip(self._labels, self._prompts, strict=True)
        return [label.name for label, prompts in both if any(one.tokens > length for one in prompts)]

    def find_partly_read(self) -> list[str]:
        """Labels of whose name or own prompts the tokenizer knows some characters and not others."""
        found = []
        for label, prompts in zip(self._labels, self._prompts, strict=True):
            if any(one.unknown for one in prompts):
                found.append(label.name)
        unreadable = set(self.find_unreadable())
        return [name for name in found if name not in unreadable]

    def check(self) -> None:
        """Raise `LabelError` for a label that the tokenizer cannot read, and for labels with the same tokens."""
        if unreadable := self.find_unreadable():
            raise LabelError(
                f"labels: {unreadable[0]!r} cannot be read, because {UNKNOWN}",
                "give the label prompts in a language of the model, or use another model",
            )
        for one, other, *_ in self.find_same():
            raise LabelError(
                f"labels: {one!r} and {other!r} are the same tokens to this model, which reads only the beginning of "
                "a long text, and only characters that its tokenizer knows",
                "give one of them other prompts",
            )

    def describe_partly_read(self) -> str | None:
        """One line about the labels of `find_partly_read`, None if there is none."""
        found = self.find_partly_read()
        if not found:
            return None
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        names = ", ".join(map(repr, found[:SHOWN]))
        prompts = f"the prompts of {names}{more}"
        return f"the model's tokenizer does not know all characters of {prompts}: they are read as unknown"
