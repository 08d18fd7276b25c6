"""Settings files: YAML that is checked against a pydantic model, with one-line errors that say what to change.

YAML 1.1 turns plain words into other values: `no` into false, `1.10` into 1.1, `017` into 15, `12:30` into 750. Where a
model has the attribute `text_only`, its section is read without that: each value is the text that stands there, and the
model converts those that are numbers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

Settings = TypeVar("Settings", bound=BaseModel)


class ConfigError(Exception):
    """An error in the configuration, which the user must correct. The message is one line; commands exit with 2."""


_MERGE, _TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"


class _Loader(yaml.SafeLoader):
    """Refuses what PyYAML accepts in silence.

    These are a key that stands twice in a mapping, tags such as `!!int`, and plain text that goes on in the next line,
    as `- a` and ` - b` do, which YAML reads as the one text `a - b`.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.comments: list[yaml.Mark] = []
        """The places of comments such as `#1` in `- cat #1`: after something else, and without a space after the #."""
        self.texts: list[yaml.Node] = []
        """Lists, and texts without quotes, in which such a comment may have been meant as text."""

    def scan_to_next_token(self) -> None:
        """Skip spaces and comments before the next token, and note the comments."""
        start: Any = self.get_mark()
        super().scan_to_next_token()
        skipped = start.buffer[start.pointer : self.pointer].splitlines()[:1]
        if start.column and skipped and re.match(r"\s*#+[^#\s]", skipped[0]):
            self.comments.append(start)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        start, end = event.start_mark, event.end_mark
        if isinstance(event, yaml.ScalarEvent) and not event.style and start.line < end.line:
            shown = " ".join(event.value.split())[:60]
            raise yaml.MarkedYAMLError(
                problem=f"the text {shown!r} spans several lines: write it on one line or in quotes, and check how the "
                "lines are indented",
                problem_mark=start,
            )
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", _TEXT):
            raise yaml.MarkedYAMLError(
                problem=f"the tag {tag.replace('tag:yaml.org,2002:', '!!')} is not read: write the value in quotes",
                problem_mark=event.start_mark,
            )
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.SequenceNode) or (
            isinstance(node, yaml.ScalarNode) and node.tag == _TEXT and not node.style
        ):
            self.texts.append(node)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value} stands twice in a mapping", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node


def parse_yaml(text: str, text_only: Callable[[str], bool] | bool = False) -> Any:
    """The value of a YAML document. Raises `yaml.YAMLError`, also for tags, and for a key that stands twice.

    With `text_only`, plain scalars are strings as they stand, also `null`, which then is the string "null". A function
    decides by the key of the document's mapping whether this holds for the value of the key.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        texts: list[yaml.Node] = []
        if text_only is True:
            texts = [node]
        elif callable(text_only) and isinstance(node, yaml.MappingNode):
            texts = [v for key, v in node.value if isinstance(key, yaml.ScalarNode) and text_only(key.value)]
        for text_node in texts:
            _keep_text(text_node, set())
        for text_node in (*loader.texts, *texts):
            _refuse_comments(text_node, loader.comments)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _refuse_comments(node: yaml.Node, comments: Sequence[Any]) -> None:
    """Raise `yaml.YAMLError` if one of these comments stands in a node, or directly behind it."""
    start: Any = node.start_mark
    end: Any = node.end_mark
    for mark in comments:
        behind = isinstance(node, yaml.ScalarNode) and not mark.buffer[end.pointer : mark.pointer].strip(" \t")
        if start.index <= mark.index and (mark.index < end.index or behind):
            raise yaml.MarkedYAMLError(
                problem="text after # is a comment in YAML: write a text that contains # in quotes, or put a space "
                "after the # of a comment",
                problem_mark=mark,
            )


def _keep_text(node: yaml.Node, seen: set[int]) -> None:
    """Make all scalars of a node strings, except the merge key `<<`."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        node.tag = _TEXT
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _keep_text(item, seen)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag != _MERGE:
                _keep_text(key, seen)
            _keep_text(value, seen)


def refuse_double_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text, as `object_pairs_hook` of `json.loads`. Raises `ValueError` if a key stands twice."""
    if len(found := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)} stands twice in an object")
    return found


def read_settings(path: Path, example: str, model: type[BaseModel]) -> dict[str, Any]:
    """The keys and values of a YAML file for `model`, not yet checked. `example` is a valid line, for an error message.

    Raises `ConfigError`.
    """
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8-sig"), lambda key: _is_text_only(model, key))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; see configs/ for examples") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys and values, such as `{example}`")
    return raw


def check_settings(path: Path | str, raw: Mapping[str, Any], model: type[Settings]) -> Settings:
    """Check keys and values against `model` and return an instance of it. `path` says in messages whose they are.

    Raises `ConfigError`, whose line names the wrong key and, for an unknown key, the most similar known key.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe_error(error, model)}") from None


def parse_override(text: str, model: type[BaseModel]) -> tuple[str, Any]:
    """Split `key.path=value` into the path and the value, read as YAML: `actors.max=4`, `labels=[cat, dog]`.

    Raises `ConfigError`.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: expected key.path=value, such as actors.max=4")
    try:
        return key.strip(), parse_yaml(value, _is_text_only(model, key.strip().partition(".")[0]))
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not YAML: {' '.join(str(error).split())}") from None


def override_keys(raw: dict[str, Any], overrides: Mapping[str, Any], model: type[BaseModel]) -> None:
    """Set the values of dotted key paths in the settings of a `model`. Raises `ConfigError`.

    `labels` is set before `labels.top_k`, in whatever order they are given, so that no value replaces another one.
    """
    for dotted in sorted(overrides, key=lambda dotted: dotted.count(".")):
        override_key(raw, dotted, overrides[dotted], model)


def override_key(raw: dict[str, Any], dotted: str, value: Any, model: type[BaseModel]) -> None:
    """Set the value of a dotted key path in the settings of a `model`. Missing mappings on the path are created.

    A model's `shorthand` is the key that a bare list or string stands for. With it other keys of that model can be set
    too: with `labels: [a, b]`, `--set labels.top_k=1` changes one key of the same label set. Such a model's `expand`
    writes out the mapping that is meant, with the content of a label file. Raises `ConfigError` for a path into a list,
    or into another value without keys, and for a file that would replace other keys than it seems to.
    """
    *parents, last = dotted.split(".")
    target, here = raw, model
    for depth, name in enumerate(parents, 1):
        field = here.model_fields.get(name)
        nested = _nested(field.annotation) if field else None
        given = child = target.get(name)
        where = ".".join(parents[:depth])
        if isinstance(child, BaseModel):
            child = child.model_dump(exclude_unset=True)
        if child == "":  # an empty key where all values are read as text
            child = None
        if child is not None and (short := getattr(nested, "shorthand", None)):
            try:
                child = nested.expand(child)  # type: ignore[union-attr]
            except ValueError as error:
                raise ConfigError(f"{dotted}: {where}: {error}") from None
            if [*parents[depth:], last] == [short] and isinstance(value, str):
                kept = {key: v for key, v in given.items() if key != short} if isinstance(given, dict) else {}
                if lost := [key for key in child if key != short and key not in kept]:
                    raise ConfigError(
                        f"{dotted}: the present file of {where} also has {', '.join(lost)}: set {where} to replace the "
                        "whole file"
                    )
                child = kept
        if isinstance(child, (list, tuple)):
            raise ConfigError(f"{dotted}: {where} is a list, whose items cannot be set one by one: give the whole list")
        if child is not None and not isinstance(child, dict):
            raise ConfigError(f"{dotted}: {where} is {str(child)[:60]!r}, which has no keys: set {where} itself")
        target[name] = dict(child or {})
        target, here = target[name], nested or BaseModel
    target[last] = value


def describe_error(error: ValidationError, model: type[BaseModel]) -> str:
    """The first error of a validation, as one line that names the key and says what to change."""
    line = " ".join(_describe_error(error, model).splitlines())
    return line.encode("utf-8", "backslashreplace").decode()  # a surrogate in a key cannot be printed


def _describe_error(error: ValidationError, model: type[BaseModel]) -> str:
    errors = error.errors()
    unknown = [one for one in errors if one["type"] == "extra_forbidden"]
    first = next(filter(_is_split_number, unknown), errors[0])
    where = ".".join(str(part) for part in first["loc"]) or "config"
    if _is_split_number(first):
        return f"unknown key {where}: write numbers with a decimal point and no comma, such as 0.1"
    if first["type"] == "extra_forbidden":
        known = _known_keys(model, first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)
        return f"unknown key {where}: did you mean {close[0]}? (known: {', '.join(known)})" if close else where
    if first["type"] == "missing":
        beside = {str(one["loc"][-1]): one["loc"] for one in unknown if one["loc"][:-1] == first["loc"][:-1]}
        wanted = str(first["loc"][-1])
        for name, place in beside.items():  # a key that is written in another way
            if difflib.get_close_matches(wanted, [name.lower()]):
                return f"unknown key {'.'.join(map(str, place))}: did you mean {wanted}?"
        return f"{where} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "tuple_type":
        message = "expected a list, such as [a, b]"
    if first["type"] == "too_short":
        message = f"expected at least {first['ctx']['min_length']}, and there are {len(first['input'])}"
        message = message if first["input"] else "the list is empty: give at least one"
    if first["type"] == "dict_type":
        message = "expected keys and values"
    if str(first["type"]).startswith("date_"):
        message = "expected a date, such as 2026-11-30"
    if first["type"] == "model_type":
        message = f"expected keys and values (known: {', '.join(_known_keys(model, first['loc']))})"
    given = f" (given: {str(first['input'])[:60]!r})" if not isinstance(first.get("input"), (dict, list)) else ""
    if first["type"] in ("string_type", "tuple_type") and isinstance(first["input"], (bool, int, float, date)):
        given = f"{given[:-1]}, which is no text in YAML: write it in quotes)"
    return f"{where}: {message}{given}"


def _is_split_number(error: Mapping[str, Any]) -> bool:
    """Tell whether an error is about the key 1 without a value, which YAML reads in `{threshold: 0,1}`."""
    name, value = str(error["loc"][-1]) if error["loc"] else "", error.get("input")
    return error["type"] == "extra_forbidden" and name.isdecimal() and value in (None, "")


def list_keys(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """Every key of a model as (dotted path, default, description), for the documentation."""
    rows = []
    for name, field in model.model_fields.items():
        nested = _nested(field.annotation)
        short = nested is not None and hasattr(nested, "shorthand")
        if nested is not None and not short:
            rows += list_keys(nested, f"{prefix}{name}.")
            continue
        if field.is_required():
            default = "required"
        else:
            value = field.get_default(call_default_factory=True)
            default = "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
            default = default.lower() if isinstance(value, bool) else default
        rows.append((prefix + name, default, field.description or ""))
        if nested is not None and short:
            rows += list_keys(nested, f"{prefix}{name}.")
    return rows


def _is_text_only(model: type[BaseModel], key: str) -> bool:
    field = model.model_fields.get(key)
    return bool(field and getattr(_nested(field.annotation), "text_only", False))


def _nested(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _known_keys(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        nested = _nested(field.annotation) if field else None
        if nested is None:
            break
        model = nested
    return sorted(model.model_fields)
