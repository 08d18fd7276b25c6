"""Fields that no table knows, and that still say that they change a response: they are refused.

Vendors add options, and spell the same option in several ways. A field is refused if it is another spelling of a known
one, or if its name has a word of `WORDS`. All other fields, such as `user`, are ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from serve.http.errors import ApiError
from serve.http.quoting import shorten

WORDS = (
    *("dimension", "embeddinglength", "embeddingtype", "matryoshka", "normali", "precision", "dtype"),
    *("quanti", "encoding", "endian", "base64", "pooling", "chunk", "multivector", "sparse", "colbert", "outputvalue"),
    *("trunc", "maxlength", "maxseqlength", "maxinputlength", "maxtokens", "prompt", "instruct", "template", "prefix"),
    *("tasktype", "tokenizer", "processorkwargs", "hypothesis", "label", "threshold", "topk", "multilabel", "softmax"),
    *("sigmoid", "activation", "functiontoapply", "temperature"),
)
"""Words in the names of options that change embeddings or scores, without case, underscores and hyphens."""
CONTAINERS = ("param", "option", "config", "setting", "kwargs", "extrabody")
"""Words in the names of objects that hold options."""
MOST_FIELDS = 64
"""Unknown fields of a request, and of an object in it, that are looked at. A request with more of them is refused."""


def normalize_name(name: str) -> str:
    """A field's name without case, underscores, hyphens and spaces: `outputDimension` is `output_dimension`."""
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


def refuse_unknown(fields: Mapping[str, Any], known: Collection[str], prefix: str = "") -> None:
    """Refuse unknown fields that would change the response. Null counts as not given.

    `fields` are those of the request, or of its object that `prefix` names with a dot behind it. `known` are the fields
    that this path reads there. Unknown objects of options (`CONTAINERS`) are looked into, and nothing is read there.
    Raises `ApiError`.
    """
    unknown = [name for name, value in fields.items() if value is not None and name not in known]
    if not unknown:
        return
    _check_count(unknown, prefix.removesuffix(".") or unknown[0])
    spellings = {normalize_name(name): name for name in known}
    for name in unknown:
        _refuse(name, prefix + name, spellings)
        for inner in _list_inner(name, prefix + name, fields[name]):
            place = f"{prefix}{name}.{inner}"
            if inner in known:
                message = f"{shorten(place)}: write {inner} beside {shorten(name)}, where this path reads it"
                raise ApiError("invalid_request", message, param=place)
            _refuse(inner, place, spellings)


def _list_inner(name: str, param: str, value: Any) -> list[str]:
    """The names of the fields that are not null, if a field is an object that holds options. Raises `ApiError`."""
    if not isinstance(value, dict) or not any(word in normalize_name(name) for word in CONTAINERS):
        return []
    names = [name for name, inner in value.items() if inner is not None]
    _check_count(names, param)
    return names


def _check_count(names: Sequence[str], param: str) -> None:
    if len(names) > MOST_FIELDS:
        message = f"{len(names)} fields that this path does not know: leave them out"
        raise ApiError("invalid_request", message, param=param)


def _refuse(name: str, param: str, spellings: Mapping[str, str]) -> None:
    normal = normalize_name(name)
    if normal in spellings:
        message = f"{shorten(param)}: write {spellings[normal]}"
    elif any(word in normal for word in WORDS):
        message = f"{shorten(param)}: this path does not know this option, which may change the response: leave it out"
    else:
        return
    raise ApiError("invalid_request", message, param=param)
