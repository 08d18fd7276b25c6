"""Label sets and the exact text that the model is asked with."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from siglip.families import siglip
from siglip.labels import DEFAULT_TEMPLATE, LabelSet, fill

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
    ("“quoted”", "“quoted”"),  # only ASCII punctuation goes, as in the reference
]


@pytest.mark.parametrize(("text", "canonical"), TEXTS)
def test_canonical_text(text: str, canonical: str) -> None:
    assert siglip.canonicalize(text) == canonical
    assert siglip.canonicalize(canonical) == canonical


def test_every_way_to_write_a_label_set(tmp_path: Path) -> None:
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


def test_braces_in_a_label_mean_nothing() -> None:
    assert fill(DEFAULT_TEMPLATE, "{0} {x}") == "This is a photo of {0} {x}."


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
def test_bad_label_sets_say_why(value: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LabelSet.model_validate(value)


def test_the_digest_is_of_names_and_prompts() -> None:
    base = LabelSet(names=("a", "b"))
    same = LabelSet(names=("a", "b"), threshold=0.5, top_k=1)
    other = LabelSet(names=("a", "b"), templates=("{label}",))
    assert base.digest(siglip) == same.digest(siglip) != other.digest(siglip)
