"""What options ask for, and how an option's value is written into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from serve.embedding.inputs import Truncation
from serve.embedding.vector_encoding import NumberType, VectorEncoding


class Refused(Exception):
    """The value of an option cannot be done. The message says what to send instead."""


@dataclass
class EmbeddingChoices:
    """What the options of a request for embeddings ask for."""

    encoding: VectorEncoding = field(default_factory=VectorEncoding)
    asked: dict[str, tuple[str, str]] = field(default_factory=dict)
    """The fields that name the numbers, and their form, list or base64, with their values."""
    uncut: str | None = None
    """The field that says that texts must not be cut."""
    from_start: str | None = None
    """The field that says that the start of a text is to be cut off."""
    most: tuple[str, int] | None = None
    """The field that says after how many tokens a text is to be cut, and the smallest such number."""

    def truncation(self, longest: int) -> Truncation:
        """What happens to texts with more than `longest` tokens, the model's input.

        What this server cannot do is refused when a text would need it.
        """
        most = self.most[1] if self.most else None
        if self.uncut:
            return Truncation(self.uncut, most)
        if self.from_start:
            return Truncation(self.from_start, most, "this server cuts off the end of a text, not its start")
        if self.most and self.most[1] < longest:
            return Truncation(self.most[0], most, "this server cuts texts after the model's own number of tokens only")
        return Truncation()


@dataclass
class ScoreChoices:
    """What the options of a classification in Hugging Face's format ask for."""

    activation: Literal["sigmoid", "softmax"] = "sigmoid"
    top_k: int | None = None
    threshold: float | None = None
    asked: dict[str, tuple[str, str]] = field(default_factory=dict)
    """The field that names the activation, and the activation."""


Apply = Callable[[Any, Any, str], None]
"""Writes an option's value (second) into the choices (first), or raises `Refused`. The third is the field's name."""


def only(*values: Any, instead: str) -> Apply:
    """Accept only these values. `instead` ends the message of a refusal."""

    def apply(_choices: Any, value: Any, _name: str) -> None:
        if value not in values:
            raise Refused(instead)

    return apply


def never(_choices: Any, value: Any, _name: str) -> None:
    """Refuse the option, unless its value is empty."""
    if value not in ("", {}, []):
        raise Refused("the model has no prompts or templates of its own: write the prompt into the text")


def refuse_two(asked: dict[str, tuple[str, str]], kind: str, name: str, value: str) -> None:
    """Note that the field `name` asks for `value`. Refuse it if another field has asked for another value."""
    other, given = asked.setdefault(kind, (name, value))
    if given != value:
        raise Refused(f"{other} asks for {given}, and this for {value}: send one of them")


def refuse(instead: str) -> Apply:
    """Refuse every value. `instead` ends the message."""

    def apply(_choices: Any, _value: Any, _name: str) -> None:
        raise Refused(instead)

    return apply


def ignore(_choices: Any, _value: Any, _name: str) -> None:
    """Accept any value, which has no effect."""


def encode(choices: EmbeddingChoices, value: NumberType | Literal["base64"], name: str) -> None:
    """Write embeddings in this number format, or in base64. `encoding_format: float` asks for lists of any numbers."""
    is_form = value == "base64" or name.endswith("encoding_format")
    refuse_two(choices.asked, "form" if is_form else "numbers", name, value)
    if value == "base64":
        choices.encoding.as_base64 = True
    elif value != "float":
        choices.encoding.numbers = value


def set_precision(choices: EmbeddingChoices, value: str, _name: str) -> None:
    """Write base64 of this floating-point type."""
    choices.encoding.half_precision = value == "float16"


def set_endianness(choices: EmbeddingChoices, value: str, _name: str) -> None:
    """Write base64 with this byte order. `native` is little-endian."""
    choices.encoding.big_endian = value == "big"


def truncate(choices: EmbeddingChoices, value: bool | str, name: str) -> None:
    """Cut long texts, or refuse them."""
    match str(value).lower():
        case "false" | "none" | "0":
            choices.uncut = f"{name}: {str(value).lower() if value is False else value}"
        case "start" | "left":
            choices.from_start = f"{name}: {value}"
        case "true" | "end" | "right" | "auto" | "1":
            pass
        case _:
            raise Refused("send true, false, NONE, START or END")


def limit(choices: EmbeddingChoices, value: int, name: str) -> None:
    """Refuse texts with more tokens than this; -1 is the number of tokens of the model's input."""
    if value >= 0 and (choices.most is None or value < choices.most[1]):  # -1 is vLLM's for the model's own length
        choices.most = (f"{name}: {value}", value)


def activate(choices: ScoreChoices, value: str, name: str) -> None:
    """Make scores with this function."""
    if value == "none":
        raise Refused("scores are probabilities: send sigmoid or softmax")
    refuse_two(choices.asked, "activation", name, value)
    choices.activation = "softmax" if value == "softmax" else "sigmoid"


def set_multi_label(choices: ScoreChoices, value: bool, name: str) -> None:
    """Make independent scores (sigmoid), or scores of labels that exclude each other (softmax)."""
    refuse_two(choices.asked, "activation", name, "sigmoid" if value else "softmax")
    choices.activation = "sigmoid" if value else "softmax"


def set_top_k(choices: ScoreChoices, value: int, _name: str) -> None:
    """Return at most this many labels."""
    choices.top_k = value


def set_threshold(choices: ScoreChoices, value: float, _name: str) -> None:
    """Leave out labels with a lower score."""
    choices.threshold = value
