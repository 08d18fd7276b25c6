"""A Markdown table of all keys of a settings model, for the documentation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def make_key_table(model: type[BaseModel], defaults: BaseModel | None = None) -> str:
    """A Markdown table with the columns key, default and meaning.

    `defaults` is the model as it is without settings. With it, the table has the defaults that really apply: a key's
    model may have other defaults where it is used elsewhere. A key that stands for any name is written `NAME`, and an
    element of a list `[]`.
    """
    lines = ["| Key | Default | Meaning |", "|---|---|---|"]
    for key, default, meaning in list_settings(model, defaults):
        cells = (f"`{key}`", f"`{default}`", meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def list_settings(
    model: type[BaseModel], defaults: BaseModel | None = None, prefix: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Each key of a model as (dotted path, default, description), keys of nested models after the key itself.

    A key whose value is always one nested model has no row of its own.
    """
    for name, field in model.model_fields.items():
        key, value = prefix + name, _default_of(field, defaults, name)
        nested, suffix = _find_nested(field.annotation)
        if nested is None or suffix or not isinstance(value, nested):
            yield key, _format(name, value), field.description or ""
        if nested is not None:
            yield from list_settings(nested, value if isinstance(value, nested) else None, f"{key}{suffix}.")


_REQUIRED = object()


def _default_of(field: FieldInfo, defaults: BaseModel | None, name: str) -> Any:
    if defaults is not None:
        return getattr(defaults, name)
    return _REQUIRED if field.is_required() else field.get_default(call_default_factory=True)


def _find_nested(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The model within an annotation, and what its place adds to the key: `.NAME` in a mapping, `[]` in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    suffix = {dict: ".NAME", list: "[]", tuple: "[]"}.get(get_origin(annotation), "")
    for argument in get_args(annotation):
        nested, inner = _find_nested(argument)
        if nested is not None:
            return nested, suffix + inner
    return None, ""


def _format(name: str, value: Any) -> str:
    """Return the default value of a key as YAML text. A number of bytes is followed by the same size in MiB."""
    if value is _REQUIRED:
        return "required"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(str, value)) + "]"
    if name.endswith("bytes") and isinstance(value, int) and value % 2**20 == 0:
        return f"{value} ({value // 2**20} MiB)"
    return str(value)
