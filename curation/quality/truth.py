"""Ground truth: people's answers about an output's images, and the design of the samples that asked for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from curation.quality.truth_files import TruthFile, list_some, read_truth_file, read_truth_folder
from curation.review.answers import RIGHT, UNSURE, WRONG
from curation.sampling.design import Design
from curation.sampling.files import FILES as SAMPLE_FILES
from curation.sampling.files import read_design, read_sample
from curation.tagged_output import ID, TaggedOutput, read_embeddings
from siglip.scoring import Floats
from storage.settings import ConfigError

_MAX_SOURCES = 62
_STATES = {RIGHT: 1, WRONG: 0, UNSURE: -1}
_EXTREMES = ((np.minimum, 1), (np.maximum, 0))
"""The lowest and the highest state of some answers, and for each the state by which unsure ones do not count."""


@dataclass(frozen=True)
class Truth:
    """Ground truth: answers about M images of an output. An answer says whether one label is right for one image.

    `positions` (M,) are the images' indices in the output's order, `ids` and `keys` their names, and `embeddings`
    (M, D) their embeddings, float32 of unit norm. Answer i is about image `image[i]` of these M and label `label[i]` of
    the output's label set; `right[i]` is True when the label is right. The questions that people were unsure about are
    not among these answers: they are `unsure_image` and `unsure_label` (U,). `weight[i]` is the number of images of the
    output that the answer stands for, relative to the other answers about its label.

    `designs` are those of the samples that asked. Without one, the answers allow no statement about other images.
    `source[i]` says from which samples or files an answer is, as a sum of bits: 1 for the first, 2 for the second, 4
    for the third. Several samples may ask the same question. `unsure_source[u]` is that of an unsure answer; by default
    all are from one file. `samples` are the ids of the sources that are samples, and "" for files. `complete`: each
    image has an answer about each label. `exclusive`: exactly one label is right for each image. `notices` are one-line
    warnings.
    """

    positions: NDArray[np.int64]
    ids: list[str]
    keys: list[str]
    embeddings: Floats
    image: NDArray[np.int64]
    label: NDArray[np.int64]
    right: NDArray[np.bool_]
    weight: NDArray[np.float64]
    complete: bool = False
    exclusive: bool = False
    unsure_image: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    unsure_label: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    designs: tuple[Design, ...] = ()
    source: NDArray[np.int64] | None = None
    unsure_source: NDArray[np.int64] | None = None
    samples: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    def sources(self) -> NDArray[np.int64]:
        """The sources of each answer, as bits, int64 (A,)."""
        return np.ones(len(self.image), np.int64) if self.source is None else self.source

    def unsure_sources(self) -> NDArray[np.int64]:
        """The sources of each unsure answer, as bits, int64 (U,)."""
        return np.ones(len(self.unsure_image), np.int64) if self.unsure_source is None else self.unsure_source

    def logits(self, output: TaggedOutput) -> Floats:
        """The logit of each answer's image and label by the output's own head: float32 (A,)."""
        return np.asarray(output.head.logits(self.embeddings)[self.image, self.label], np.float32)


def group_answers(truth: Truth, labels: int) -> list[NDArray[np.intp]]:
    """For each label, the indices of the answers about it, in their order."""
    order = np.argsort(truth.label, kind="stable")
    return np.split(order, np.searchsorted(truth.label[order], np.arange(1, labels)))


def check_sampled(truth: Truth) -> None:
    """Raise `ConfigError` for answers that are no sample of the output: they show nothing about other images."""
    if not truth.designs:
        raise ConfigError("the answers are no sample of the output, so that they cannot show a precision")


def read_truth(
    paths: Path | Sequence[Path],
    output: TaggedOutput,
    *,
    strict: bool = False,
    samples: Sequence[Path] = (),
) -> Truth:
    """Read ground truth from files, or from the folders of samples, and find its images in the output.

    See `curation.quality.truth_files` for the files. Of several answers about an image and a label, that of the last
    file counts. Answers of a sample belong to its design, which is read from the folder of the file or from one of the
    folders `samples`. Files whose rows say everything about an image count as a random sample of the output's images,
    and a notice says so unless they name all images. Answers about single labels that belong to no sample allow no
    statement about other images, and neither do rows with weights: the truth then has no designs, and a notice.

    Rows about unknown images or labels are left out, and a notice counts and names them; with `strict` they raise.
    When several images have the same `sha256`, the first is meant.

    Raises `ConfigError` for a file that cannot be read, a key that several images have, answers of a sample whose
    design is not there, and when no answer says right or wrong.
    """
    given = [paths] if isinstance(paths, Path) else list(paths)
    files = [file for path in given for file in (read_truth_folder(path) if path.is_dir() else [read_truth_file(path)])]
    notices = [notice for file in files for notice in file.notices]
    folders = [*samples, *(file.path.parent for file in files if (file.path.parent / SAMPLE_FILES[1]).exists())]
    designs = {design.sample: (design, folder) for folder in dict.fromkeys(folders) if (design := read_design(folder))}
    found = _Answers(output, strict, notices)
    for file in files:
        found.add(_adopt(file, list(designs.values())))
    used = _choose_designs({name: design for name, (design, _) in designs.items()}, found, output, notices)
    return _make_truth(output, found, used, files, notices)


class _Answers:
    """The answers of all files. `parts` has, for each file in order, arrays with an item for each answer: the image's
    position, the label's index, the state (1 right, 0 wrong, -1 unsure), the weight, and the source's bit."""

    def __init__(self, output: TaggedOutput, strict: bool, notices: list[str]) -> None:
        self._output, self._strict, self._notices = output, strict, notices
        self._known = {label: index for index, label in enumerate(output.labels.label_names())}
        self.samples: set[str] = set()
        self._sources: dict[str, int] = {}
        self.undesigned = False
        self.parts: list[tuple[NDArray[Any], ...]] = []

    @property
    def sources(self) -> tuple[str, ...]:
        """The ids of the sources that are samples, and "" for files."""
        return tuple(name if name in self.samples else "" for name in self._sources)

    def add(self, file: TruthFile) -> None:
        names = list(dict.fromkeys(row.image for row in file.rows))
        where = dict(zip(names, self._find(file, names), strict=True))
        unknown = {label for row in file.rows for label in (row.labels if row.label is None else (row.label,))}
        self._report(file, sorted(unknown - self._known.keys()), "labels", "in the output's label set")
        self.samples |= {row.sample for row in file.rows}
        loose = [row for row in file.rows if not row.sample]
        self.undesigned |= any(row.label is not None or not np.isnan(row.weight) for row in loose)
        if file.complete:
            self._add_whole(file, where)
            return
        rows = [row for row in file.rows if where[row.image] >= 0 and row.label in self._known]
        if rows:
            self.parts.append(
                (
                    np.asarray([where[row.image] for row in rows], np.int64),
                    np.asarray([self._known[row.label or ""] for row in rows], np.int64),
                    np.asarray([_STATES[row.answer] for row in rows], np.int64),
                    np.asarray([row.weight for row in rows], np.float64),
                    np.asarray([self._number(row.sample, file) for row in rows], np.int64),
                )
            )

    def _add_whole(self, file: TruthFile, where: dict[str, int]) -> None:
        rows = [row for row in file.rows if where[row.image] >= 0]
        right = np.zeros((len(rows), len(self._known)), bool)
        for index, row in enumerate(rows):
            right[index, [self._known[name] for name in row.labels if name in self._known]] = True
        weight = np.asarray([row.weight for row in rows], np.float64)
        source = self._number("", file)
        position = np.asarray([where[row.image] for row in rows], np.int64)
        image, label = np.indices(right.shape).reshape(2, -1)
        states = right.reshape(-1).astype(np.int64)
        self.parts.append((position[image], label, states, weight[image], np.full(len(image), source)))

    def _number(self, sample: str, file: TruthFile) -> int:
        """The bit of a source: see `Truth.source`."""
        number = self._sources.setdefault(sample or str(file.path), len(self._sources))
        if number >= _MAX_SOURCES:
            raise ConfigError(f"{file.path}: more than {_MAX_SOURCES} samples and files of answers: join some files")
        return 1 << number

    def _find(self, file: TruthFile, names: list[str]) -> list[int]:
        positions = _find_positions(file.path, self._output, file.name_column, names)
        missing = [name for name, position in zip(names, positions, strict=True) if position < 0]
        self._report(file, missing, "images", f"in {self._output.uri}")
        self._leave_out_changed(file, names, positions)
        return [int(position) for position in positions]

    def _leave_out_changed(self, file: TruthFile, names: list[str], positions: NDArray[np.int64]) -> None:
        """Set the positions of images to -1 whose bytes are not those of the answered images.

        Ids number the images of an output, so that another output has the same ones.
        """
        digests = {row.image: row.sha256 for row in file.rows if row.sha256}
        named = [index for index, name in enumerate(names) if name in digests and positions[index] >= 0]
        if not named:
            return
        stored = self._output.take(positions[named], ["sha256"])["sha256"].to_pylist()
        changed = [
            index for index, digest in zip(named, stored, strict=True) if digest not in (None, digests[names[index]])
        ]
        positions[changed] = -1
        self._report(file, [names[index] for index in changed], "images", "those that the answers are about, by sha256")

    def _report(self, file: TruthFile, names: list[str], what: str, where: str) -> None:
        if names:
            message = f"{file.path}: {len(names):,} {what} are not {where}: {list_some(names)}"
            if self._strict:
                raise ConfigError(message)
            self._notices.append(f"{message}. They are left out; --strict refuses them")


def _adopt(file: TruthFile, designs: Sequence[tuple[Design, Path]]) -> TruthFile:
    """Name the sample of answers that do not name it, if all of them are answers to one sample's questions."""
    loose = {(row.image, row.label) for row in file.rows if row.label is not None and not row.sample}
    for design, folder in designs if loose else ():
        questions, _ = read_sample(folder)
        asked = zip(questions[file.name_column].to_pylist(), questions["label"].to_pylist(), strict=True)
        if loose <= set(asked):
            rows = [replace(row, sample=row.sample or design.sample) for row in file.rows]
            return replace(file, rows=rows)
    return file


def _choose_designs(
    designs: dict[str, Design], found: _Answers, output: TaggedOutput, notices: list[str]
) -> tuple[Design, ...]:
    missing = sorted(found.samples - designs.keys() - {""})
    if missing:
        raise ConfigError(
            f"the answers belong to the sample {list_some(missing)}, which is not in their folder: name the folder of "
            "the sample with --sample"
        )
    if found.undesigned:
        notices.append(
            "some answers belong to no sample, so that they tell nothing about other images: there are no intervals. "
            "If they are answers to a sample, name its folder with --sample"
        )
        return ()
    used = [design for name, design in designs.items() if name in found.samples]
    for design in used:
        if design.weights and design.weights != output.weights:
            raise ConfigError(
                f"the sample {design.sample} was drawn from an output of another model: draw a sample of {output.uri}"
            )
        if design.images != output.rows:
            notices.append(
                f"the sample {design.sample} was drawn from {design.images:,} images, and the output has "
                f"{output.rows:,}: the figures hold for the other images only if they are like the first ones"
            )
    if "" in found.samples:
        used.append(Design("", output.rows, {}))
    return tuple(used)


def _make_truth(
    output: TaggedOutput, found: _Answers, designs: tuple[Design, ...], files: Sequence[TruthFile], notices: list[str]
) -> Truth:
    parts = found.parts
    if not parts or not any((part[2] >= 0).any() for part in parts):
        why = "".join(f" ({notice})" for notice in notices)
        raise ConfigError(f"{', '.join(str(file.path) for file in files)}: no answer says right or wrong{why}")
    position, label, state, weight, source = (np.concatenate(column) for column in zip(*parts, strict=True))
    if len(parts) > 1:  # of several answers about an image and a label, the last counts
        pair = position * len(output.labels.names) + label
        order = np.argsort(pair, kind="stable")
        starts = np.flatnonzero(np.append(True, pair[order][1:] != pair[order][:-1]))
        last = order[np.append(starts[1:], len(order)) - 1]
        source = np.bitwise_or.reduceat(source[order], starts)[np.argsort(last)]
        kept = np.sort(last)
        least, most = (end.reduceat(np.where(state < 0, rest, state)[order], starts) for end, rest in _EXTREMES)
        if disputed := int((least < most).sum()):
            notices.append(
                f"{disputed:,} questions have other answers in another file: the last file counts. Of several people's "
                "answers in the folder of a sample, such a question is unsure until it is settled"
            )
        position, label, state, weight = (one[kept] for one in (position, label, state, weight))
    # Images in the order in which the answers name them first.
    distinct, first, image = np.unique(position, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    positions, image = distinct[np.argsort(first)], rank[image]
    if "" in found.samples and designs and len(positions) < output.rows:
        notices.append(
            f"the {len(positions):,} images count as a random sample of the output's {output.rows:,}: they are not of "
            "`sightline sample`"
        )
    read = output.take(positions, [ID, "key", "embedding"])
    embeddings = np.concatenate([read_embeddings(batch) for batch in read.select(["embedding"]).to_batches()])
    sure = state >= 0
    complete = len(files) == 1 and files[0].complete
    return Truth(
        positions,
        read[ID].to_pylist(),
        read["key"].to_pylist(),
        embeddings,
        image[sure].astype(np.int64),
        label[sure],
        state[sure] == 1,
        np.where(np.isnan(weight[sure]), 1.0, weight[sure]),
        complete,
        complete and files[0].exclusive,
        image[~sure].astype(np.int64),
        label[~sure],
        designs,
        source[sure],
        source[~sure],
        found.sources,
        tuple(notices),
    )


def _find_positions(path: Path, output: TaggedOutput, name: str, wanted: list[str]) -> NDArray[np.int64]:
    """Find the positions of images by name, in one pass over the output's column `name`. -1 for unknown images."""
    values = pa.array(wanted, pa.string())
    positions = np.full(len(wanted), -1, np.int64)
    first = 0
    for batch in output.batches([name], rows=65_536):
        where = pc.index_in(batch[name], value_set=values)
        rows = np.flatnonzero(where.is_valid().to_numpy(zero_copy_only=False))
        found = where.take(pa.array(rows)).to_numpy()
        again = (positions[found] >= 0) | (np.bincount(found, minlength=len(wanted))[found] > 1)
        if name == "key" and again.any():
            double = wanted[int(found[again][0])]
            raise ConfigError(f"{path}: several images have the key {double!r}: name the images by {ID} or sha256")
        for row, index in zip(rows[::-1], found[::-1], strict=True):
            if positions[index] < 0 or positions[index] >= first:  # of several images with the same bytes, the first
                positions[index] = first + row
        first += len(batch)
    return positions
