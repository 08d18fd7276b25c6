"""One person's review of a sample: its questions, answers and originals, open for as long as its page is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI

from curation.review.agreement import About, read_reviews
from curation.review.answers import NOBODY, SETTLED, AnswerFile
from curation.review.app import make_app
from curation.review.originals import Originals
from curation.sampling.files import Thumbnails, read_sample
from curation.tagged_output import ID
from storage.settings import ConfigError
from storage.store import StoreOptions


@dataclass(frozen=True)
class Review:
    """An open review. `asked` are the rows of the sample that the page asks about."""

    app: FastAPI
    answers: AnswerFile
    originals: Originals
    asked: tuple[int, ...]

    def describe_progress(self) -> str:
        """Return how many questions are answered."""
        answered = sum(row in self.answers.current for row in self.asked)
        return f"{answered:,} of {len(self.asked):,} answered"


@contextmanager
def open_review(
    folder: Path, name: str | None = None, disputed: dict[About, dict[str, str]] | None = None
) -> Iterator[Review]:
    """Open the review of the sample in a folder by a person, or by nobody in particular.

    With `disputed`, the settled answers are open, and only these questions are asked. Raises `ConfigError` for a folder
    without a sample, for a name that cannot be one, and if another process has the answers open.
    """
    if name in (NOBODY, SETTLED):
        raise ConfigError(f"--name {name!r}: choose another name")
    table, metadata = read_sample(folder)
    person = SETTLED if disputed is not None else name or NOBODY
    about = list(zip(table[ID].to_pylist(), table["label"].to_pylist(), strict=True))
    asked = tuple(row for row, one in enumerate(about) if disputed is None or one in disputed)
    with (
        closing(AnswerFile(folder, table, person)) as answers,
        closing(Originals(table, StoreOptions.from_environment())) as originals,
    ):
        app = make_app(table, metadata, Thumbnails(folder), originals, answers, person, disputed)
        yield Review(app, answers, originals, asked)


def find_disputed(folder: Path) -> dict[About, dict[str, str]]:
    """Return what people disagree about in a sample. Raises `ConfigError` if fewer than two people have answered."""
    reviews = read_reviews(folder)
    if len(reviews.people) < 2:
        raise ConfigError(f"--settle: fewer than two people have answered in {folder}: use --name for each person")
    return reviews.disagreements()
