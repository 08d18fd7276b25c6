"""Labels that a model's tokenizer cannot read, or that are the same tokens to it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from siglip.checkpoint import pin_model
from siglip.config import ModelConfig
from siglip.encoder import Encoder
from siglip.labels import LabelError, LabelSet

LONG = "a label with far more words than the text tower of the small checkpoint reads"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(pin_model(ModelConfig(source="tiny", dtype="float32", compile=False)))


def embed(encoder: Encoder, labels: Any) -> list[str]:
    """Embed labels and return the warnings."""
    warnings: list[str] = []
    encoder.embed_labels(LabelSet.model_validate(labels), warnings.append)
    return warnings


@pytest.mark.parametrize("name", ["红", "红 色", "红色 蓝色 绿色"])
def test_a_label_of_unknown_characters_is_refused(encoder: Encoder, name: str) -> None:
    """The template has known tokens, and the label none."""
    message = re.escape(
        f"labels: {name!r} cannot be read, because the model's tokenizer knows none of its characters: "
    )
    for labels in ([name], ["red circle", name], [{"name": "red", "prompts": ["red", name]}]):
        expected = message.replace(re.escape(repr(name)), "'red'") if isinstance(labels[0], dict) else message
        with pytest.raises(LabelError, match=expected):
            embed(encoder, labels)
    assert embed(encoder, [{"name": name, "prompts": ["red"]}]) == []


def test_labels_that_differ_only_in_what_the_model_does_not_read_are_refused(encoder: Encoder) -> None:
    for one, other in ((f"{LONG} one", f"{LONG} two"), ("红 red", "蓝 red")):
        with pytest.raises(LabelError, match=re.escape(f"labels: {one!r} and {other!r} are the same tokens")):
            embed(encoder, ["blue star", one, other])
    assert embed(encoder, [f"{LONG} one", {"name": f"{LONG} two", "prompts": ["short"]}]) == []


def test_labels_are_refused_before_anything_is_embedded(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_embed_ids", None)
    with pytest.raises(LabelError, match="cannot be read"):
        embed(encoder, ["红"])


def test_a_label_with_some_unknown_characters_is_a_warning(encoder: Encoder) -> None:
    names = [f"{color} 红" for color in ("red", "green", "blue", "cyan", "pink", "grey")]
    [warning] = embed(encoder, ["circle", *names])
    assert warning == (
        "the model's tokenizer does not know all characters of the prompts of 'red 红', 'green 红', 'blue 红', "
        "'cyan 红', 'pink 红' and 1 more: they are read as unknown"
    )
    assert embed(encoder, ["circle"]) == []


def test_readings_count_tokens_after_the_cut(encoder: Encoder) -> None:
    _, [short, cut, other, mixed] = encoder.embed_and_read(["a red circle", f"{LONG} 红", LONG, "红 red"])
    ids = encoder.tokenize(["a red circle"])[0]
    assert (short.tokens, short.unknown) == (int(np.argmax(ids == 1)) + 1, 0)
    assert 0 < short.known < short.tokens
    assert cut.tokens > encoder.text_length
    assert (cut.unknown, cut.digest) == (0, other.digest)
    assert mixed.unknown == 1
    assert mixed.known > 0
