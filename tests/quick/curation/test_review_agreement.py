"""Answers of several people: merging, Cohen's kappa, disagreements."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from curation.review.agreement import Agreement, compute_kappa, merge_answers, read_reviews
from storage.settings import ConfigError


def write(folder: Path, name: str, *answers: tuple[int, str], sample: str = "s1") -> None:
    path = folder / (f"answers-{name}.jsonl" if name else "answers.jsonl")
    lines = [
        {"id": f"x/{image}", "label": "cat", "sample": sample, "weight": 2.0, "answer": answer}
        for image, answer in answers
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def merged(folder: Path) -> dict[str, str]:
    return {row["id"]: row["answer"] for row in merge_answers(folder)}


def test_answers_of_one_person_are_the_last_ones(tmp_path: Path) -> None:
    write(tmp_path, "", (0, "right"), (1, "wrong"), (0, "wrong"), (2, "right"), (2, "taken back"))
    assert merged(tmp_path) == {"x/1": "wrong", "x/0": "wrong"}
    assert merge_answers(tmp_path)[0]["weight"] == 2.0
    assert read_reviews(tmp_path).describe() == []


def test_people_who_disagree_make_a_question_unsure_until_it_is_settled(tmp_path: Path) -> None:
    write(tmp_path, "anna", (0, "right"), (1, "right"), (2, "right"), (3, "unsure"), (4, "unsure"))
    write(tmp_path, "ben", (0, "right"), (1, "wrong"), (2, "unsure"), (3, "unsure"), (5, "wrong"))
    write(tmp_path, "", (1, "unsure"))
    expected = {"x/0": "right", "x/1": "unsure", "x/2": "right", "x/3": "unsure", "x/4": "unsure", "x/5": "wrong"}
    assert merged(tmp_path) == expected
    reviews = read_reviews(tmp_path)
    assert reviews.disagreements() == {("x/1", "cat"): {"": "unsure", "anna": "right", "ben": "wrong"}}
    assert reviews.describe()[-1] == "disagreements: 1, settled: 0"
    write(tmp_path, "settled", (1, "wrong"))
    assert merged(tmp_path) == {**expected, "x/1": "wrong"}
    settled = read_reviews(tmp_path)
    assert settled.people == reviews.people  # settled answers are nobody's
    assert settled.describe()[-1] == "disagreements: 1, settled: 1"


def test_agreement_is_of_the_questions_that_both_answered(tmp_path: Path) -> None:
    write(tmp_path, "a", (0, "right"), (1, "right"), (2, "wrong"), (3, "wrong"), (4, "unsure"), (6, "right"))
    write(tmp_path, "b", (0, "right"), (1, "wrong"), (2, "wrong"), (3, "wrong"), (4, "right"), (5, "right"))
    write(tmp_path, "c", (9, "right"))
    first, *others = read_reviews(tmp_path).agreements()
    assert first == Agreement("a", "b", 4, 3, 0.5)
    assert str(first) == "a and b: 3 of 4 answers are equal, Cohen's kappa 0.50"
    assert [(one.questions, one.kappa) for one in others] == [(0, None), (0, None)]


def test_kappa_is_that_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    for share in (0.5, 0.9):
        one = random.random(200) < share
        other = np.where(random.random(200) < 0.7, one, random.random(200) < share)
        kappa = compute_kappa(zip(one.tolist(), other.tolist(), strict=True))
        assert kappa == pytest.approx(cohen_kappa_score(one, other), abs=1e-12)


def test_kappa_is_not_defined_where_chance_alone_gives_full_agreement() -> None:
    assert compute_kappa([]) is None
    for same in (True, False):
        assert compute_kappa([(same, same)] * 49) is None
    assert compute_kappa([(True, False)] * 5) == 0
    assert compute_kappa([(True, True), (False, False)]) == 1
    assert compute_kappa(product([True, False], [True, False])) == 0


def test_files_of_two_samples_and_lines_that_are_no_answers_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a", (0, "right"))
    write(tmp_path, "b", (0, "right"), sample="s2")
    with pytest.raises(ConfigError, match="another sample"):
        read_reviews(tmp_path)
    write(tmp_path, "b", (0, "yes"))
    with pytest.raises(ConfigError, match="answer 1"):
        read_reviews(tmp_path)


def test_an_unfinished_line_of_a_person_who_is_answering_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a", (0, "right"))
    with (tmp_path / "answers-a.jsonl").open("a") as file:
        file.write('{"id": "x/1", "lab')
    assert merged(tmp_path) == {"x/0": "right"}
    assert read_reviews(tmp_path).dropped == 1
