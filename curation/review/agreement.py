"""Answers of several people about one sample: merged answers, agreement, and what people disagree about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from curation.review.answers import (
    ANSWERS,
    NOBODY,
    RIGHT,
    SETTLED,
    TAKEN_BACK,
    UNSURE,
    WRONG,
    answers_path,
    read_answer_lines,
)
from curation.tagged_output import ID
from storage.settings import ConfigError

About = tuple[str, str]
"""What an answer is about: the id of an image, and a label."""


@dataclass(frozen=True)
class Agreement:
    """How far two people agree about the `questions` questions that both answered with right or wrong.

    `agreed` is the number of equal answers. `kappa` is Cohen's kappa (see `compute_kappa`).
    """

    one: str
    other: str
    questions: int
    agreed: int
    kappa: float | None

    def __str__(self) -> str:
        """One line for people."""
        names = f"{show_person(self.one)} and {show_person(self.other)}"
        if not self.questions:
            return f"{names}: no question with right or wrong from both"
        kappa = "Cohen's kappa is not defined" if self.kappa is None else f"Cohen's kappa {self.kappa:.2f}"
        return f"{names}: {self.agreed:,} of {self.questions:,} answers are equal, {kappa}"


@dataclass(frozen=True)
class Reviews:
    """The answers of all people about a sample.

    `people` maps each person's name, in the order of the names, to the person's answers that count: for each question
    the row of the answers file. `settled` are the settled disagreements. Answers that were taken back are in neither.
    `dropped` is the number of unfinished lines that were left out.
    """

    people: dict[str, dict[About, dict[str, Any]]]
    settled: dict[About, dict[str, Any]]
    dropped: int = 0

    def merge(self) -> list[dict[str, Any]]:
        """Return one row for each answered question, with the merged `answer`.

        A settled answer counts. Otherwise right or wrong counts if nobody says the opposite, so that one person's
        `unsure` does not outvote another person's answer. Where people disagree, and where nobody is sure, the answer
        is `unsure`. The other columns are those of the first person's row. Rows are in the order of the people, and of
        each one's answers.
        """
        rows: dict[About, dict[str, Any]] = {}
        for answers in (*self.people.values(), self.settled):
            for about, row in answers.items():
                rows.setdefault(about, row)
        return [{**row, "answer": self._merge_one(about)} for about, row in rows.items()]

    def disagreements(self) -> dict[About, dict[str, str]]:
        """Return the questions about which one person says right and another wrong, settled or not.

        The values are all people's answers, by name. An `unsure` beside an answer is not a disagreement.
        """
        found = {about: None for answers in self.people.values() for about in answers}
        return {about: said for about in found if {RIGHT, WRONG} <= set((said := self._said(about)).values())}

    def agreements(self) -> list[Agreement]:
        """Return the agreement of each pair of people. Settled answers have no part in it."""
        return [_compare(self, one, other) for one, other in combinations(self.people, 2)]

    def describe(self) -> list[str]:
        """Return lines for people: the agreement of each pair, and the number of disagreements; none for one person."""
        if len(self.people) < 2:
            return []
        disputed = self.disagreements()
        settled = len(disputed.keys() & self.settled.keys())
        return [*map(str, self.agreements()), f"disagreements: {len(disputed):,}, settled: {settled:,}"]

    def _said(self, about: About) -> dict[str, str]:
        return {name: answers[about]["answer"] for name, answers in self.people.items() if about in answers}

    def _merge_one(self, about: About) -> str:
        if about in self.settled:
            return str(self.settled[about]["answer"])
        sure = set(self._said(about).values()) - {UNSURE}
        return sure.pop() if len(sure) == 1 else UNSURE


def read_reviews(folder: Path) -> Reviews:
    """Read all answers files in the folder of a sample: `answers.jsonl`, `answers-NAME.jsonl`, `answers-settled.jsonl`.

    Raises `ConfigError` for a file that cannot be read or has a line that is not an answer, and for files of different
    samples.
    """
    paths = {answers_path(folder): NOBODY} | {
        path: path.stem.removeprefix("answers-") for path in sorted(folder.glob("answers-*.jsonl"))
    }
    people: dict[str, dict[About, dict[str, Any]]] = {}
    samples: dict[Any, Path] = {}
    dropped = 0
    for path, name in paths.items():
        if not path.is_file():
            continue
        lines, unfinished = read_answer_lines(path)
        dropped += unfinished
        answers: dict[About, dict[str, Any]] = {}
        for number, row in enumerate(lines, 1):
            about = row.get(ID), row.get("label")
            if not (isinstance(about[0], str) and isinstance(about[1], str) and row.get("answer") in ANSWERS):
                raise ConfigError(f"{path}: answer {number} is not an answer about an image's {ID} and a label")
            samples.setdefault(row.get("sample"), path)
            answers.pop((about[0], about[1]), None)
            if row["answer"] != TAKEN_BACK:
                answers[about[0], about[1]] = row
        if len(samples) > 1:
            raise ConfigError(f"{path} has answers about another sample than {next(iter(samples.values()))}: move it")
        if answers or name == SETTLED:
            people[name] = answers
    settled = people.pop(SETTLED, {})
    return Reviews(people, settled, dropped)


def merge_answers(folder: Path) -> list[dict[str, Any]]:
    """Return one row for each question of a sample that someone answered; see `Reviews.merge` and `read_reviews`."""
    return read_reviews(folder).merge()


def compute_kappa(pairs: Iterable[tuple[bool, bool]]) -> float | None:
    """Compute Cohen's kappa of two people's answers to the same questions: (observed - expected) / (1 - expected).

    `observed` is the share of equal answers. `expected` is the share that would be equal by chance, if both had given
    their own shares of right and wrong at random (Cohen 1960, A coefficient of agreement for nominal scales,
    Educational and Psychological Measurement 20, 37-46). 1 is full agreement, 0 is what chance gives.

    Returns None where it is not defined: without a question, and when `expected` is 1 because both people gave one and
    the same answer to every question. Answers are not weighted, so the figure is one of the sample, not of the output.
    """
    answers = list(pairs)
    if not answers:
        return None
    count = len(answers)
    first, second = sum(one for one, _ in answers), sum(other for _, other in answers)
    # Whole numbers until the division, so that an expected agreement of 1 is found exactly.
    expected = first * second + (count - first) * (count - second)
    if expected == count * count:
        return None
    observed = count * sum(one == other for one, other in answers)
    return (observed - expected) / (count * count - expected)


def show_person(name: str) -> str:
    """Return a person's name for a message."""
    return name or "the person without a name"


def _compare(reviews: Reviews, one: str, other: str) -> Agreement:
    first, second = reviews.people[one], reviews.people[other]
    pairs = [
        (first[about]["answer"] == RIGHT, second[about]["answer"] == RIGHT)
        for about in first
        if about in second and UNSURE not in (first[about]["answer"], second[about]["answer"])
    ]
    return Agreement(one, other, len(pairs), sum(a == b for a, b in pairs), compute_kappa(pairs))
