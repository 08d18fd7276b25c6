"""`model.text_rule`: texts reach the tokenizer as the chosen rule prepares them, and outputs say which rule it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import sentencepiece
from transformers import AutoTokenizer
from typer.testing import CliRunner

from pipelines.config import JobConfig
from pipelines.output.fingerprint import make_fingerprint
from pipelines.output.labels import claim_labels, make_label_table, read_label_table
from pipelines.output.output import Output
from sightline.cli import app
from siglip.checkpoint import PinnedModel, pin_model
from siglip.config import ModelConfig
from siglip.encoder import Encoder
from siglip.families import FAMILIES
from siglip.labels import LabelSet
from tests.support.checkpoints import make_siglip, make_siglip2

TEXTS = ["C++, a_language!", "  Jack-in-the-Box  ", "50% off: (today)"]
PLAIN = ["c a language", "jackinthebox", "50 off today"]
LOWER = ["c++, a language!", "jack-in-the-box", "50% off: (today)"]


def pin(directory: Path, rule: Any) -> PinnedModel:
    return pin_model(ModelConfig(source=str(directory), text_rule=rule, dtype="float32", compile=False))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_siglip(tmp_path_factory.mktemp("siglip") / "model")


@pytest.fixture(scope="module")
def siglip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_siglip2(tmp_path_factory.mktemp("siglip2") / "model")


@pytest.mark.parametrize(("rule", "expected"), [("auto", PLAIN), ("canonicalize", PLAIN), ("lowercase", LOWER)])
def test_siglip_reads_texts_by_the_chosen_rule(siglip: Path, rule: str, expected: list[str]) -> None:
    encoder = Encoder(pin(siglip, rule))
    assert [encoder._rule.canonicalize(text) for text in TEXTS] == expected
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(siglip / "spiece.model"))
    for row, text in zip(encoder.tokenize(TEXTS), expected, strict=True):
        ids = pieces.encode(text)
        assert row[: len(ids)].tolist() == ids


@pytest.mark.parametrize(("rule", "expected"), [("auto", LOWER), ("lowercase", LOWER), ("canonicalize", PLAIN)])
def test_siglip2_reads_texts_by_the_chosen_rule(siglip2: Path, rule: str, expected: list[str]) -> None:
    encoder = Encoder(pin(siglip2, rule))
    theirs = AutoTokenizer.from_pretrained(siglip2)(
        expected, padding="max_length", max_length=encoder.text_length, truncation=True, return_tensors="np"
    )["input_ids"]
    assert encoder.tokenize(TEXTS).tolist() == theirs.tolist()


def test_only_another_rule_than_the_familys_own_is_in_the_fingerprint(siglip: Path, siglip2: Path) -> None:
    config = JobConfig.model_validate({"input": "in", "output": "out", "labels": ["a cat", "C++"]})

    def describe(directory: Path, rule: str) -> dict[str, Any]:
        return make_fingerprint(config, pin(directory, rule), pa.schema([]))

    for directory, own, other in ((siglip, "canonicalize", "lowercase"), (siglip2, "lowercase", "canonicalize")):
        assert describe(directory, "auto") == describe(directory, own)
        assert "model.text_rule" not in describe(directory, "auto")
        changed = describe(directory, other)
        assert changed["model.text_rule"] == other
        assert changed["labels.digest"] != describe(directory, "auto")["labels.digest"]


def test_an_outputs_labels_know_their_rule(siglip2: Path, tmp_path: Path) -> None:
    labels = LabelSet.model_validate({"names": ["C++", "a dog!"], "templates": ["{label}"]})
    pinned = pin(siglip2, "canonicalize")
    encoder = Encoder(pinned)
    table = make_label_table(labels, encoder.embed_labels(labels), encoder.scale, pinned)
    claim_labels(Output(str(tmp_path)), table)
    stored = read_label_table(Output(str(tmp_path)))
    assert stored.prompts == [["c"], ["a dog"]] == labels.prompts(FAMILIES[stored.family])
    assert pin_model(stored.model).family == stored.family == "siglip2/canonicalize"


def test_labels_check_shows_what_each_label_becomes(siglip: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("C++\nC#\n")
    command = ["labels", "check", str(tmp_path / "labels.txt"), "--model", str(siglip), "--show"]
    same = CliRunner().invoke(app, command)
    assert same.exit_code == 1
    assert "C++: this is a photo of c" in same.output
    apart = CliRunner().invoke(app, [*command, "--text-rule", "lowercase"])
    assert "C++: this is a photo of c++." in apart.output
    assert "same prompts" not in apart.output
