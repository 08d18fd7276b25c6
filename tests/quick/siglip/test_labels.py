"""Label sets and the exact prompts that the model embeds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from siglip.families import siglip, siglip2
from siglip.labels import DEFAULT_TEMPLATE, LabelError, LabelSet, fill

TEXTS = [
    ("golden_retriever", "golden retriever"),
    ("Golden  Retriever!", "golden retriever"),
    ("rock'n'roll", "rocknroll"),
    ("  T-shirt, red\t(large)\n", "tshirt red large"),
    ("a__b", "a b"),
    ("50% off", "50 off"),
    ("ÜBER straße", "über straße"),
    ("東京タワー", "東京タワー"),
    ("naïve café №5", "naïve café №5"),
    ("{label}", "label"),
    ("C++", "c"),
    ("!!!", ""),
    ("“quoted”", "“quoted”"),  # only ASCII punctuation is removed, as in the reference
]


@pytest.mark.parametrize(("text", "canonical"), TEXTS)
def test_canonical_text(text: str, canonical: str) -> None:
    assert siglip.canonicalize(text) == canonical
    assert siglip.canonicalize(canonical) == canonical


def test_all_notations_of_a_label_set(tmp_path: Path) -> None:
    (tmp_path / "labels.yaml").write_text("names: [cat, dog]\nthreshold: 0.2\n")
    (tmp_path / "labels.txt").write_text("cat\n\ndog\n")
    forms = [
        ["cat", "dog"],
        {"names": ["cat", {"name": "dog"}]},
        str(tmp_path / "labels.yaml"),
        str(tmp_path / "labels.txt"),
    ]
    sets = [LabelSet.model_validate(form) for form in forms]
    assert [s.label_names() for s in sets] == [["cat", "dog"]] * 4
    assert len({s.digest(siglip) for s in sets}) == 1
    assert sets[2].thresholds() == [0.2, 0.2]


def test_prompts_and_thresholds_of_one_label() -> None:
    labels = LabelSet.model_validate(
        {
            "names": ["hot_dog", {"name": "dog", "prompts": ["a dog", "A Puppy!"], "threshold": 0.5}],
            "templates": ["a photo of a {label}", "{} in a picture"],
            "threshold": 0.1,
        }
    )
    assert labels.prompts(siglip) == [["a photo of a hot dog", "hot dog in a picture"], ["a dog", "a puppy"]]
    assert labels.thresholds() == [0.1, 0.5]


def test_braces_in_a_label_have_no_meaning() -> None:
    assert fill(DEFAULT_TEMPLATE, "{0} {x}") == "This is a photo of {0} {x}."


@pytest.mark.parametrize(
    "template",
    [
        "{} and {label}",
        "{label} {x}",
        "{label} {0}",
        "{{label}}",
        "about {{}}.",
        "{label} {Label}",
        "{} { label }",
        "{label}}",
    ],
)
def test_a_template_has_one_placeholder(template: str) -> None:
    """Other braces would be read by the model as text."""
    labels = LabelSet.model_validate({"names": ["a"], "templates": ["a photo of a {label}", template]})
    with pytest.raises(LabelError, match="has other braces than"):
        labels.check(siglip)


def test_a_placeholder_in_a_prompt_is_refused_and_braces_in_a_label_are_not() -> None:
    for prompt in ("a photo of {label}", "{}!"):
        labels = LabelSet.model_validate([{"name": "cat", "prompts": ["a cat", prompt]}])
        with pytest.raises(LabelError, match="prompts are used as they stand"):
            labels.check(siglip)
    LabelSet.model_validate(["{label} x", "{y}", {"name": "z", "prompts": ["set {z, y}"]}]).check(siglip)
    LabelSet.model_validate({"names": ["a"], "templates": ["{label}, {label}", "100 % {}"]}).check(siglip)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "at least 1"),
        (["a", "a"], "listed twice"),
        ({"names": ["a"], "templates": ["a photo"]}, "has no {label}"),
        ({"names": ["a"], "threshold": 1.5}, "less than or equal to 1"),
        ("nowhere.yaml", "does not exist"),
        ([" "], "empty name or prompt"),
        ([{"name": "a", "prompts": [" "]}], "empty name or prompt"),
    ],
)
def test_invalid_label_sets_are_refused(value: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LabelSet.model_validate(value)


def test_the_digest_covers_names_and_prompts() -> None:
    base = LabelSet(names=("a", "b"))
    same = LabelSet(names=("a", "b"), threshold=0.5, top_k=1)
    other = LabelSet(names=("a", "b"), templates=("{label}",))
    assert base.digest(siglip) == same.digest(siglip) != other.digest(siglip)


@pytest.mark.parametrize(("one", "other"), [("C", "C++"), ("C++", "C#"), ("100", "100%"), ("5", "-5"), ("Cat", "cat")])
def test_labels_with_the_same_text_are_refused_with_both_names(one: str, other: str) -> None:
    labels = LabelSet.model_validate([one, "dog", other])
    with pytest.raises(LabelError, match=re.escape(f"{one!r} and {other!r} are the same text to this model")):
        labels.check(siglip)
    if one.lower() != other.lower():
        labels.check(siglip2)
    # With its own prompts, one of them is another text.
    LabelSet.model_validate([one, {"name": other, "prompts": ["something else"]}]).check(siglip)
    with pytest.raises(LabelError, match="are the same text"):
        LabelSet.model_validate([one, {"name": other, "prompts": [f"This is a photo of {one}!"]}]).check(siglip)


def test_labels_of_punctuation_only_are_refused() -> None:
    with pytest.raises(LabelError, match=re.escape("no character of '!!!' remains")):
        LabelSet.model_validate(["!!!"]).check(siglip)
    with pytest.raises(LabelError, match="'dots' has a prompt that is empty"):
        LabelSet.model_validate([{"name": "dots", "prompts": ["..."]}]).check(siglip)
    LabelSet.model_validate(["!!!", "?"]).check(siglip2)


def test_a_final_capital_sigma_is_lower_cased_as_in_big_vision() -> None:
    """Lower-casing comes after punctuation is removed, because the lower-case form depends on the next character."""
    assert siglip.canonicalize("ΟΔΟΣ.Α") == "οδοσα"
    assert siglip.canonicalize("ΟΔΟΣ!") == siglip.canonicalize("οδος") == "οδος"
    assert siglip.canonicalize("ΟΣ'") == "ος"


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("C++", "c++"), ("  50% OFF, today!\n", "50% off, today!"), ("golden_retriever", "golden retriever"), ("_", "")],
)
def test_siglip_2_keeps_punctuation(text: str, canonical: str) -> None:
    assert siglip2.canonicalize(text) == canonical


def test_the_digest_is_that_of_the_first_release() -> None:
    """Outputs of earlier versions are recognised by it."""
    dog = {"name": "Dog", "prompts": ["A Puppy!", "a dog"]}
    labels = LabelSet.model_validate(
        {"names": ["golden_retriever", dog, "50% off", "ÜBER", "東京"], "templates": ["a photo of a {label}", "{}"]}
    )
    assert labels.digest(siglip) == "835eeeba2fb53692af17d804cb5eef777271099372e363adfb8c639112ce732a"
    assert labels.digest(siglip2) != labels.digest(siglip)
