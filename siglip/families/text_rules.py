"""Text rules that a user chooses in place of a family's own: `model.text_rule`.

A family with another rule is a family of its own, with a name of its own, such as `siglip2/canonicalize`. So the name
of a family, which outputs and processes hand on, says how texts were prepared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siglip.families import siglip, siglip2
from siglip.families.family import Family

RULES = {"canonicalize": siglip, "lowercase": siglip2}
"""The rules by their names in `model.text_rule`, each with the family whose own rule it is."""

OWN_RULES = frozenset(family.NAME for family in RULES.values())
"""The names of the families that have their own rule."""


@dataclass
class FamilyWithRule:
    """A family whose texts are prepared by the rule of another one. It is chosen, and never recognised."""

    family: Family
    rule: str
    NAME: str
    FILES: tuple[str, ...]
    CLASSES: tuple[str, ...]

    def recognizes(self, tokenizer: Mapping[str, Any], files: Collection[str]) -> bool:
        """Return False: no checkpoint says that its texts are to be prepared otherwise."""
        return False

    def canonicalize(self, text: str) -> str:
        """Return the text as the rule's own family prepares it."""
        return str(RULES[self.rule].canonicalize(text))

    def load_tokenizer(self, directory: Path) -> Any:
        """Load the family's tokenizer, without rules of its own about punctuation: transformers' SigLIP has them."""
        tokenizer = self.family.load_tokenizer(directory)
        if hasattr(tokenizer, "canonicalize_text"):
            tokenizer.canonicalize_text = lambda text, **_: text
        return tokenizer


def find_rule(family: str) -> str:
    """Return the text rule of a family, by the family's name: a key of `RULES`."""
    own, _, chosen = family.partition("/")
    return chosen or next(rule for rule, module in RULES.items() if own == module.NAME)


def choose_family(family: Family, rule: str) -> Family:
    """Return a family with a rule, one of `RULES` or `auto`, which is the family's own."""
    if rule == "auto" or RULES[rule].NAME == family.NAME:
        return family
    return FamilyWithRule(family, rule, f"{family.NAME}/{rule}", family.FILES, family.CLASSES)
