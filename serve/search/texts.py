"""The texts of a search: their checks, and the prompts that stand for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from serve.config import EndpointLimits
from serve.embedding.inputs import check_labels
from serve.http.errors import ApiError
from serve.label_sets.cache import LabelCache, LabelKey, make_key
from serve.label_sets.request_labels import explain_label_error, make_label_set
from serve.model import ModelAbout
from serve.search.output import Query, SearchedOutput, list_texts
from siglip.families import FAMILIES
from siglip.labels import LabelError, LabelSet, TextRule
from siglip.scoring import Floats


@dataclass(frozen=True)
class QueryTexts:
    """The texts of a query as labels with the templates of the output, so that they have the scores of such labels.

    `known` are their averaged prompts, float32 (L, D), if the output has all of them, and `unwanted` the texts of
    `not`. `key` is that of the cache of label sets.
    """

    labels: LabelSet
    unwanted: tuple[str, ...]
    key: LabelKey
    known: Floats | None
    rule: TextRule

    @classmethod
    def make(cls, query: Query, opened: SearchedOutput, about: ModelAbout, limits: EndpointLimits) -> Self | None:
        """Check a query's texts; None if it has none. Raises `ApiError`, whose `param` is `text` or `not`."""
        names, rule = list_texts(query), FAMILIES[about.family]
        if not names:
            return None
        templates = opened.templates
        labels = None
        # The texts of `not` are checked after the others, so that an error names the right field.
        for field, checked in (("text", list(dict.fromkeys(query.texts))), ("not", names)):
            try:
                check_labels(checked, templates, limits)
                labels = make_label_set(checked, templates, rule) if checked else None
            except ApiError as error:
                raise _name_field(error, field) from None
        assert labels is not None
        known = opened.find_texts(labels)
        return cls(labels, tuple(query.without), make_key(names, templates), known, rule)

    @property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of the label set's digest."""
        return self.labels.digest(self.rule)[:16]

    def count(self, cache: LabelCache) -> tuple[int, int]:
        """Return how many prompts have to be embedded, and how many are cached or known."""
        prompts = len(self.labels.names) * len(self.labels.templates)
        missing = 0 if self.known is not None else len(cache.find_missing(self.labels, self.rule))
        return missing, prompts - missing


def explain_unreadable(error: LabelError, unwanted: tuple[str, ...]) -> ApiError:
    """Return the error for texts that the model cannot read, or cannot tell apart."""
    field = "not" if any(repr(text) in error.what for text in unwanted) else "text"
    return _name_field(explain_label_error(error), field)


def _name_field(error: ApiError, field: str) -> ApiError:
    """Return an error about labels as one about the field of a search."""
    message = error.message.removeprefix(f"{error.param}: ")
    return ApiError(error.code, f"{field}: {message}", param=field)
