"""Families of SigLIP checkpoints, which differ in how they prepare texts. A new family is one file and one entry in
`FAMILIES`.

A checkpoint's family is recognised by its files, never by its name. Towers, preprocessing and scoring are the same for
all families, and are configured by the checkpoint's own settings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from siglip.families import siglip, siglip2
from siglip.families.family import Family
from siglip.families.text_rules import RULES, choose_family

__all__ = ["FAMILIES", "Family", "recognize_family"]
FAMILIES: dict[str, Family] = {
    family.NAME: family
    for own in (siglip, siglip2)
    for family in (choose_family(own, rule) for rule in ("auto", *RULES))
}
"""The supported families, and those with a text rule that is not their own, by name."""


def recognize_family(tokenizer: Mapping[str, Any], files: Collection[str]) -> Family | None:
    """The family of a checkpoint with this `tokenizer_config.json` and these files, or None."""
    return next((family for family in FAMILIES.values() if family.recognizes(tokenizer, files)), None)
