"""The label set that a request brings along: its checks, with messages for the author of a request.

The messages of `siglip.labels` are for the author of a label file, who can write prompts for each label.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve.http.errors import ApiError
from serve.http.quoting import quote
from siglip.labels import LabelError, LabelSet, TextRule

FIX = "write it in other words, or leave it out"


def make_label_set(names: Sequence[str], templates: Sequence[str], rule: TextRule) -> LabelSet:
    """Make a label set of a request's labels and templates, for a model with this text rule.

    Raises `ApiError`, whose `param` is `labels` or `templates`, for what the model cannot tell apart. What its
    tokenizer cannot read is found when the labels are embedded: see `explain_label_error`.
    """
    for template in templates:
        if "{label}" not in template and "{}" not in template:
            raise _refuse("templates", f"{quote(template)} has no {{label}} in it: write it where the label belongs")
    seen: set[str] = set()
    for name in names:
        if not name.strip():
            raise _refuse("labels", "a label is empty: leave it out")
        if name in seen:
            raise _refuse("labels", f"{quote(name)} is listed twice: send it once")
        seen.add(name)
    labels = LabelSet(names=tuple(names), templates=tuple(templates), threshold=0.0, top_k=None)
    for what, _ in labels.find_placeholders():
        raise _refuse("templates", what)
    for what, texts in labels.find_lookalikes():
        raise _refuse("labels" if seen.issuperset(texts) else "templates", what)
    try:
        labels.check(rule)
    except LabelError as error:
        raise explain_label_error(error) from None
    return labels


def explain_label_error(error: LabelError) -> ApiError:
    """The error for a request whose labels a model cannot read, or cannot tell apart."""
    return _refuse("labels", f"{error.what.removeprefix('labels: ')}: {FIX}")


def _refuse(param: str, message: str) -> ApiError:
    return ApiError("invalid_request", f"{param}: {message}", param=param)
