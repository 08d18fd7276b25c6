"""Copies: planted ones are found, different images are not copies, and no group holds two images that are not close."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from typer.testing import CliRunner

import sightline
from benchmarks.outputs import SyntheticOutput, write_output
from curation.dedup import described, earlier, mapped, pairs, parts, result
from curation.dedup.cells import Cells, list_cells, split_cell
from curation.dedup.dedup import COPY, SIMILAR
from curation.dedup.fingerprints import MOST_LEVELS, compare_fingerprints, take_fingerprints
from curation.dedup.groups import NONE, Groups, Members
from curation.dedup.pairs import ComparedNeighbors, ListedNeighbors, find_pairs
from curation.dedup.result import SCHEMA, Deduplicated, dedup_output
from curation.tagged_output import TaggedOutput, open_output
from sightline.cli import app
from siglip.labels import LabelSet
from siglip.scoring import Floats
from storage.settings import ConfigError
from tests.support.pictures import COPIES, draw_picture, encode_jpeg
from tests.support.vectors import draw_vectors

LABELS = LabelSet.model_validate({"names": ["cat", "dog"], "threshold": 0.5})
WIDTH = 32


def near(vector: Floats, cosine: float, seed: int) -> Floats:
    """A vector of unit norm with about this cosine to another one."""
    other = draw_vectors(1, len(vector), seed)[0]
    other -= vector * (other @ vector)
    other /= np.linalg.norm(other)
    return np.asarray(cosine * vector + np.sqrt(1 - cosine**2) * other, np.float32)


class Made:
    """An output in the making: embeddings, thumbnails, digests and keys, a list for each shard."""

    def __init__(self, shards: int) -> None:
        self.vectors: list[list[Floats]] = [[] for _ in range(shards)]
        self.rows: list[list[tuple[bytes, str, str]]] = [[] for _ in range(shards)]

    def add(self, shard: int, vector: Floats, thumbnail: bytes, digest: str, key: str) -> None:
        self.vectors[shard].append(vector)
        self.rows[shard].append((thumbnail, digest, key))

    def write(self, root: Path, *, shards: int | None = None, thumbnails: bool = True) -> TaggedOutput:
        count = len(self.rows) if shards is None else shards
        rows = [row for shard in self.rows[:count] for row in shard]
        made = SyntheticOutput(
            LABELS,
            draw_vectors(2, WIDTH, 999),
            count,
            lambda shard: np.stack(self.vectors[shard]),
            key=lambda row: rows[row][2],
            digest=lambda row: rows[row][1],
        )
        write_output(str(root), replace(made, thumbnail=lambda row: rows[row][0]) if thumbnails else made)
        return open_output(str(root))


def make(different: int, planted: int, shards: int = 3, seed: int = 0) -> tuple[Made, dict[str, str]]:
    """Different pictures, and copies of some of them. Returns the copies' keys with those of their originals."""
    rng = np.random.default_rng(seed)
    made, originals = Made(shards), {}
    vectors = draw_vectors(different, WIDTH, seed)
    pictures = [draw_picture(rng) for _ in range(different)]
    for number, picture in enumerate(pictures):
        # Half of the pictures have close embeddings: the same scene.
        vector = vectors[number] if number % 2 == 0 else near(vectors[number - 1], 0.97, number)
        made.add(number % shards, vector, encode_jpeg(picture), f"{seed} {number}", f"photo {number}")
        vectors[number] = vector
    for number in range(planted):
        kind = list(COPIES)[number % len(COPIES)]
        copy = COPIES[kind](pictures[number], rng)
        key = f"{kind} {number}"
        made.add((number + 1) % shards, near(vectors[number], 0.93, 10_000 + number), encode_jpeg(copy), key, key)
        originals[key] = f"photo {number}"
    return made, originals


def read_groups(target: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(target / "groups.parquet").to_pylist())


def pairs_of(target: Path, kind: str) -> set[tuple[str, str]]:
    """The pairs of keys that are in one group."""
    groups: dict[str, list[str]] = {}
    for row in read_groups(target):
        if row["kind"] == kind:
            groups.setdefault(row["group"], []).append(row["key"])
    return {(one, other) for keys in groups.values() for one, other in combinations(sorted(keys), 2)}


def check_cosines(output: TaggedOutput, target: Path) -> None:
    """No group holds a pair below its threshold."""
    table = output.to_arrow(["id", "embedding"])
    vectors = {
        id_: np.array(vector, np.float64)
        for id_, vector in zip(table["id"].to_pylist(), table["embedding"].to_pylist(), strict=True)
    }
    groups: dict[tuple[str, str], list[str]] = {}
    for row in read_groups(target):
        if row["kind"] != "identical":
            groups.setdefault((row["kind"], row["group"]), []).append(row["id"])
    for (kind, _), ids in groups.items():
        assert len(ids) > 1
        for one, other in combinations(ids, 2):
            assert vectors[one] @ vectors[other] >= (COPY if kind == "copy" else SIMILAR)


@pytest.mark.parametrize("small_cells", [False, True])
def test_planted_copies_are_found_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_cells: bool
) -> None:
    if small_cells:
        monkeypatch.setattr(parts, "CELL_ROWS", 60)
        monkeypatch.setattr(parts, "MOST_ROWS", 150)
    made, originals = make(700, 200)
    output = made.write(tmp_path / "tags")
    done = dedup_output(output, tmp_path / "result")
    found = pairs_of(tmp_path / "result", "copy")
    right = {tuple(sorted(pair)) for pair in originals.items()}
    assert len(found & right) >= (0.95 if not small_cells else 0.9) * len(right)
    assert found <= right
    assert (done.rows, done.new, done.identical, done.confirmed) == (900, 900, 0, True)
    assert done.copies == len(found & right)
    keep = (tmp_path / "result/keep.txt").read_text().splitlines()
    assert len(keep) == len(set(keep)) == done.keep == 900 - done.copies
    # Two photos of one scene are similar, and both are kept.
    assert ("photo 0", "photo 1") in pairs_of(tmp_path / "result", "similar")
    assert done.similar >= 250
    check_cosines(output, tmp_path / "result")


def test_identical_bytes_are_one_image_whatever_their_embeddings_are(tmp_path: Path) -> None:
    made = Made(2)
    picture = encode_jpeg(draw_picture(np.random.default_rng(1)))
    for number, vector in enumerate(draw_vectors(6, WIDTH, 1)):
        made.add(number % 2, vector, picture, "the same" if number < 4 else str(number), f"{number}")
    done = dedup_output(made.write(tmp_path / "tags"), tmp_path / "result")
    assert (done.identical, done.copies, done.keep) == (3, 0, 3)
    rows = [row for row in read_groups(tmp_path / "result") if row["kind"] == "identical"]
    assert {row["key"] for row in rows} == {"0", "1", "2", "3"}
    assert [row["representative"] for row in rows] == [True, False, False, False]


@pytest.mark.parametrize(("prefer", "kept"), [("largest", "b"), ("newest", "c"), ("a*", "a"), ("nothing like it", "b")])
def test_the_preferred_copy_is_kept(tmp_path: Path, prefer: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    picture, vector = draw_picture(rng), draw_vectors(1, WIDTH, 5)[0]
    made = Made(1)
    for number, key in enumerate("abc"):
        made.add(0, near(vector, 0.99, number), encode_jpeg(picture, 80 + number), key, key)
    output = made.write(tmp_path / "tags")
    batches = TaggedOutput.batches

    def batches_with_sizes(self: TaggedOutput, columns: Any, rows: int = 8192) -> Any:
        for batch in batches(self, columns, rows):
            if "width" in columns:
                place = batch.schema.get_field_index("width")
                sizes = [900 if key == "b" else 640 for key in batch["key"].to_pylist()]
                batch = batch.set_column(place, "width", np.array(sizes, np.int32))
            yield batch

    monkeypatch.setattr(TaggedOutput, "batches", batches_with_sizes)
    assert dedup_output(output, tmp_path / "result", prefer=prefer).copies == 2
    [head] = [row["key"] for row in read_groups(tmp_path / "result") if row["representative"]]
    assert head == kept


def test_a_later_run_compares_the_new_images_with_all(tmp_path: Path) -> None:
    made, originals = make(300, 120, shards=4, seed=3)
    first = made.write(tmp_path / "first", shards=2)
    whole = made.write(tmp_path / "whole")
    assert dedup_output(whole, tmp_path / "at once").copies >= 114
    done = dedup_output(first, tmp_path / "result")
    assert done.rows == done.new == first.rows
    # The output has grown: the same folder, with the shards of the second night.
    about = json.loads((tmp_path / "result/dedup.json").read_text())
    about["settings"]["output"] = whole.uri
    (tmp_path / "result/dedup.json").write_text(json.dumps(about))
    kept = (tmp_path / "result/keep.txt").read_text().splitlines()
    done = dedup_output(whole, tmp_path / "result")
    assert (done.rows, done.new) == (whole.rows, whole.rows - first.rows)
    right = {tuple(sorted(pair)) for pair in originals.items()}
    found = pairs_of(tmp_path / "result", "copy")
    assert len(found & right) >= 0.95 * len(right)
    assert found <= right
    # What was kept stays, whichever copy came first.
    assert set(kept) <= set((tmp_path / "result/keep.txt").read_text().splitlines())
    check_cosines(whole, tmp_path / "result")
    before = (tmp_path / "result/groups.parquet").read_bytes()
    again = dedup_output(whole, tmp_path / "result")
    assert (again.new, again.copies, again.keep) == (0, done.copies, done.keep)
    assert (tmp_path / "result/groups.parquet").read_bytes() == before


def test_images_of_another_output_that_have_leaked(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    pictures, vectors = [draw_picture(rng) for _ in range(60)], draw_vectors(60, WIDTH, 8)
    train, test = Made(2), Made(1)
    for number in range(60):
        train.add(number % 2, vectors[number], encode_jpeg(pictures[number]), f"train {number}", f"train {number}")
    train.add(0, near(vectors[0], 0.99, 1), encode_jpeg(pictures[0], 70), "twice", "train 0 again")
    for number in range(0, 60, 4):
        copy = COPIES["resized"](pictures[number], rng) if number else pictures[0]
        test.add(0, near(vectors[number], 0.95, number), encode_jpeg(copy), f"test {number}", f"test {number}")
    test.add(0, vectors[1], encode_jpeg(pictures[1]), "train 1", "test identical")
    training = train.write(tmp_path / "train")
    done = dedup_output(training, tmp_path / "result", test.write(tmp_path / "test"))
    assert (done.rows, done.identical) == (61, 1)
    found = {(row["key"], row["representative"]) for row in read_groups(tmp_path / "result") if row["kind"] == "copy"}
    leaked = {f"train {number}" for number in range(0, 60, 4)} | {"train 0 again"}
    assert {key for key, head in found if not head} == leaked
    assert all(key.startswith("test") for key, head in found if head)
    assert done.keep == 61 - 1 - len(leaked)
    keep = (tmp_path / "result/keep.txt").read_text().splitlines()
    keys = dict(zip(*training.to_arrow(["id", "key"]).to_pydict().values(), strict=True))
    assert {keys[id_] for id_ in keep} == set(keys.values()) - leaked - {"train 1"}
    again = dedup_output(training, tmp_path / "result", open_output(str(tmp_path / "test")))
    assert (again.new, again.copies, again.identical, again.keep) == (0, done.copies, 1, done.keep)
    # The other output grows: images that were looked at before may be copies of what is new there.
    for number in range(1, 60, 4):
        copy = COPIES["resized"](pictures[number], rng)
        test.add(0, near(vectors[number], 0.95, number), encode_jpeg(copy), f"more {number}", f"test {number}")
    grown = test.write(tmp_path / "grown")
    about = json.loads((tmp_path / "result/dedup.json").read_text())
    about["settings"].update(against=grown.uri, against_ledgers=grown.manifest["ledgers"] - 1)
    (tmp_path / "result/dedup.json").write_text(json.dumps(about))
    more = dedup_output(training, tmp_path / "result", grown)
    assert (more.new, more.identical, more.copies) == (61, 1, len(leaked) + 14)


def test_without_thumbnails_no_copy_is_confirmed(tmp_path: Path) -> None:
    made, _ = make(60, 30)
    done = dedup_output(made.write(tmp_path / "tags", thumbnails=False), tmp_path / "result", similar=0.9)
    assert (done.copies, done.confirmed, done.keep) == (0, False, 90)
    assert done.similar >= 30


def test_a_thumbnail_that_cannot_be_read_is_no_copy(tmp_path: Path) -> None:
    made = Made(1)
    vector = draw_vectors(1, WIDTH, 1)[0]
    for number in range(4):
        made.add(0, vector, b"no image" if number < 3 else b"", str(number), str(number))
    done = dedup_output(made.write(tmp_path / "tags"), tmp_path / "result")
    assert (done.copies, done.similar, done.keep) == (0, 3, 4)


def add(groups: Groups, rank: NDArray[np.int64], rows: NDArray[np.int64], vectors: Floats, *, listed: bool) -> None:
    rows = rows[np.argsort(rank[rows])]
    if not listed:
        groups.add(rows, ComparedNeighbors(vectors[rows], groups.limit))
        return
    found = find_pairs(vectors[rows], len(rows), groups.limit, 10**9).pairs
    assert found is not None
    groups.add(rows, ListedNeighbors(found, len(rows)))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("threshold", [0.7, 0.9, 0.97])
def test_no_group_holds_a_pair_below_the_threshold_and_no_chain_forms(threshold: float, listed: bool) -> None:
    """Points on a line, each close to the next one only, in random order and in several parts."""
    angles = np.linspace(0, 3, 400)
    vectors = np.zeros((400, 8), np.float32)
    vectors[:, 0], vectors[:, 1] = np.cos(angles), np.sin(angles)
    rng = np.random.default_rng(1)
    rank = rng.permutation(400)
    groups = Groups(threshold, rank, np.ones(400, bool), np.ones(400, bool))
    for _ in range(6):
        part = rng.choice(400, 200, replace=False)
        add(groups, rank, part, vectors, listed=listed)
    add(groups, rank, np.arange(400), vectors, listed=listed)
    heads = np.unique(groups.leader[groups.leader != NONE])
    assert len(heads) > 1
    for head in heads.tolist():
        members = np.flatnonzero(groups.leader == head)
        assert head in members
        assert (vectors[members].astype(np.float64) @ vectors[members].T.astype(np.float64)).min() >= threshold
        assert np.allclose(groups.cosine[members], vectors[members] @ vectors[head], atol=1e-3)


def test_groups_that_are_united_and_continued_keep_their_members() -> None:
    """Twelve rows in each of 40 tight groups, found in parts, taken over from a result and united."""
    rng = np.random.default_rng(2)
    vectors = np.concatenate(
        [[near(center, 0.9999, 100 + n) for n in range(12)] for center in draw_vectors(40, WIDTH, 3)]
    )
    order = rng.permutation(len(vectors))
    vectors, rank = vectors[order], rng.permutation(len(vectors))
    everything = np.ones(len(vectors), bool)
    groups = Groups(0.95, rank, everything, everything)
    for part in (order % 12 < 4, (order % 12 >= 4) & (order % 12 < 8), order % 12 >= 8):
        add(groups, rank, np.flatnonzero(part), vectors, listed=True)
    assert len(np.unique(groups.leader)) == 120
    members = np.flatnonzero(groups.leader != np.arange(len(rank)))
    continued = Groups(0.95, rank, everything, everything)
    continued.join(Members(groups.leader[members], members, groups.cosine[members]))
    assert (continued.leader == groups.leader).all()
    assert np.allclose(continued.cosine, groups.cosine)
    for one in (groups, continued):
        found = one.list_mergeable(np.unique(one.leader), one.radius, vectors)
        assert len(found) == 120
        assert len(one.merge(found, vectors)) == 80
        assert not len(one.list_mergeable(np.unique(one.leader), one.radius, vectors))
        assert len(np.unique(one.leader)) == 40
        assert len(set(zip(one.leader.tolist(), (order // 12).tolist(), strict=True))) == 40
        assert np.allclose(one.cosine, (vectors * vectors[one.leader]).sum(axis=1), atol=1e-5)
        # The representative of a united group is the one with the lowest rank.
        for head in np.unique(one.leader).tolist():
            assert rank[head] == rank[one.leader == head].min()


@pytest.mark.parametrize("new", [1, 700, 2500])
def test_pairs_are_those_of_a_whole_comparison(new: int) -> None:
    vectors = np.repeat(draw_vectors(500, WIDTH, 1), 5, axis=0) + 0.05 * draw_vectors(2500, WIDTH, 2)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True))[np.random.default_rng(3).permutation(2500)]
    close = find_pairs(vectors, new, 0.8, 10**9)
    expected = np.triu(vectors @ vectors.T >= 0.8, 1)
    expected[new:] = False
    assert close.pairs is not None
    assert set(zip(close.pairs["one"].tolist(), close.pairs["other"].tolist(), strict=True)) == set(
        map(tuple, np.argwhere(expected).tolist())
    )
    assert np.allclose(close.pairs["cosine"], (vectors[close.pairs["one"]] * vectors[close.pairs["other"]]).sum(axis=1))
    assert (close.near == (expected.any(axis=0) | expected.any(axis=1))).all()
    few = find_pairs(vectors, new, 0.8, len(close.pairs) - 1)
    assert few.pairs is None
    assert (few.near == close.near).all()
    for place in (0, new - 1):
        listed = ListedNeighbors(close.pairs, len(vectors))(place)
        compared = ComparedNeighbors(vectors, 0.8)(place)
        assert (listed[0] == compared[0]).all()
        assert np.allclose(listed[1], compared[1])


@pytest.mark.parametrize("most", [0, 10**6])
def test_the_result_does_not_depend_on_where_pairs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    made, _ = make(300, 100)
    output = made.write(tmp_path / "tags")
    done = dedup_output(output, tmp_path / "one")
    monkeypatch.setattr(parts, "PAIRS_PER_ROW", most)
    monkeypatch.setattr(result, "_LINES", 50)
    monkeypatch.setattr(described, "BATCH_ROWS", 40)
    monkeypatch.setattr(earlier, "_LINES", 30)
    assert dedup_output(output, tmp_path / "other") == done
    assert (tmp_path / "one/keep.txt").read_text() == (tmp_path / "other/keep.txt").read_text()
    lines = read_groups(tmp_path / "other")
    assert dedup_output(output, tmp_path / "other") == replace(done, new=0)
    assert read_groups(tmp_path / "other") == lines
    for line, other in zip(read_groups(tmp_path / "one"), lines, strict=True):
        # Products of matrices of other shapes are rounded otherwise.
        assert line == {**other, "cosine": pytest.approx(other["cosine"], abs=1e-6)}


def test_memory_for_each_image_is_small_even_if_all_are_in_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Buffers that are small beside this output, as they are beside millions of images, and one thread.
    for module, name, value in (
        (result, "_LINES", 1000),
        (described, "BATCH_ROWS", 1000),
        (earlier, "_LINES", 1000),
        (pairs, "_TILE", 64),
        (parts, "CELL_ROWS", 256),
        (parts, "MOST_ROWS", 3000),
        (parts, "count_cores", lambda: 1),
    ):
        monkeypatch.setattr(module, name, value)

    def measure(rows: int) -> tuple[int, int]:
        made = SyntheticOutput(
            LABELS,
            draw_vectors(2, 8, 0),
            rows // 4000,
            lambda shard: draw_vectors(4000, 8, shard),
            digest=lambda row: str(row // 2),
        )
        root = tmp_path / str(rows)
        write_output(f"{root}/tags", made)
        output, peaks = open_output(f"{root}/tags"), []
        for new in (rows, 0):
            tracemalloc.start()
            done = dedup_output(output, root / "result", similar=0.9999)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert (done.rows, done.new, done.identical) == (rows, new, rows // 2)
        return peaks[0], peaks[1]

    few, many = measure(8_000), measure(24_000)
    for small, large in zip(few, many, strict=True):
        print(large, small, (large - small) / 32000)
        assert large - small < 200 * 16_000


def test_images_whose_representative_is_gone_are_compared_anew(tmp_path: Path) -> None:
    made, _ = make(90, 60)
    output = made.write(tmp_path / "tags")
    done = dedup_output(output, tmp_path / "result")
    lines = read_groups(tmp_path / "result")
    head = next(line["group"] for line in lines if line["kind"] == "copy")
    gone = head.split("/")[0] + "/4000000"
    changed = [{key: gone if value == head else value for key, value in line.items()} for line in lines]
    pq.write_table(pa.Table.from_pylist(changed, SCHEMA), tmp_path / "result/groups.parquet")
    keep = (tmp_path / "result/keep.txt").read_text()
    (tmp_path / "result/keep.txt").write_text(keep.replace(f"{head}\n", f"{gone}\n"))
    again = dedup_output(output, tmp_path / "result")
    assert (again.new, again.copies, again.keep) == (2, done.copies, done.keep)
    assert head in (tmp_path / "result/keep.txt").read_text().splitlines()


def test_a_result_that_holds_an_image_twice_is_refused(tmp_path: Path) -> None:
    made, _ = make(90, 60)
    output = made.write(tmp_path / "tags")
    dedup_output(output, tmp_path / "result")
    lines = read_groups(tmp_path / "result")
    pq.write_table(pa.Table.from_pylist([*lines, *lines], SCHEMA), tmp_path / "result/groups.parquet")
    with pytest.raises(ConfigError, match="an image in two groups"):
        dedup_output(output, tmp_path / "result")
    (tmp_path / "result/keep.txt").write_text("not an id\n")
    with pytest.raises(ConfigError, match="no result of `sightline dedup`"):
        dedup_output(output, tmp_path / "result")


@pytest.mark.parametrize("block", [4096, 64])
def test_images_that_are_all_the_same_are_one_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, block: int
) -> None:
    """K-means cannot part them. Those of a part with more new ones than a block are not compared to begin with."""
    monkeypatch.setattr(parts, "_BLOCK", block)
    monkeypatch.setattr(parts, "MOST_ROWS", 100)
    monkeypatch.setattr(parts, "CELL_ROWS", 50)
    vector, picture = draw_vectors(1, WIDTH, 4)[0], encode_jpeg(draw_picture(np.random.default_rng(4)))
    made = Made(1)
    for number in range(1000):
        made.add(0, near(vector, 0.9999, 100 + number), picture, str(number), str(number))
    done = dedup_output(made.write(tmp_path / "tags"), tmp_path / "result")
    # A few groups of cells that are not neighbours may stay.
    assert done.keep <= 5
    assert done.copies == 1000 - done.keep


def test_close_rows_share_a_cell() -> None:
    vectors = draw_vectors(3000, 16, 1)
    twins = np.stack([near(vector, 0.98, number) for number, vector in enumerate(vectors)])
    both = np.concatenate([vectors, twins])
    cells = Cells(both[::7], 30)
    nearest = cells.assign(both, 4)
    assert all(len(set(row)) == 4 for row in nearest.tolist())
    cosines = np.take_along_axis(both @ cells.centers.T, nearest.astype(np.int64), axis=1)
    assert (np.diff(cosines, axis=1) <= 0).all()
    shared = [set(nearest[row]) & set(nearest[row + 3000]) for row in range(3000)]
    assert np.mean([bool(one) for one in shared]) >= 0.99
    listed = list(list_cells(nearest, len(cells)))
    assert sum(map(len, listed)) == 4 * len(both)
    assert (Cells(both[:9], 2).assign(both[:9], 4)[:, 2:] == -1).all()
    assert sum(map(len, list_cells(Cells(both[:9], 1).assign(both[:9], 4), 1))) == 9
    assert all((np.diff(cell) > 0).all() for cell in listed)
    split = list(split_cell(np.arange(6000), both, 500))
    assert max(map(len, split)) <= 500
    assert set(np.concatenate(split)) == set(range(6000))


def test_fingerprints_tell_copies_from_other_pictures() -> None:
    rng = np.random.default_rng(11)
    pictures = [draw_picture(rng) for _ in range(60)]
    prints, readable = take_fingerprints([encode_jpeg(picture) for picture in pictures])
    assert readable.all()
    for name, change in COPIES.items():
        copies, _ = take_fingerprints([encode_jpeg(change(picture, rng)) for picture in pictures])
        same = [compare_fingerprints(prints[n], copies[n : n + 1]).are_copies()[0] for n in range(len(pictures))]
        assert np.mean(same) >= 0.95, name
    for number in range(len(pictures)):
        others = np.delete(np.arange(len(pictures)), number)
        assert compare_fingerprints(prints[number], prints[others]).levels.min() > 2 * MOST_LEVELS


def test_figures_of_one_kind_on_a_plain_ground_are_no_copies_of_each_other() -> None:
    """Their hashes and coarse colours agree: most of the picture is ground."""
    rng = np.random.default_rng(3)

    def draw(kind: str, turn: float, side: tuple[int, int] = (220, 180)) -> Image.Image:
        image = Image.new("RGB", side, (128, 128, 128))
        center = (side[0] / 2, side[1] / 2)
        corners = {"star": 10, "triangle": 3, "bar": 4}[kind]
        radii = [50 if kind != "star" or number % 2 == 0 else 22 for number in range(corners)]
        angles = np.radians(turn + np.arange(corners) * 360 / corners)
        if kind == "bar":
            angles = np.radians(turn + np.array([10, 170, 190, 350]))
        points = [(center[0] + r * np.cos(a), center[1] + r * np.sin(a)) for r, a in zip(radii, angles, strict=True)]
        ImageDraw.Draw(image).polygon(points, fill=(200, 60, 40))
        return image

    for kind, turn in (("star", 36), ("triangle", 40), ("bar", 25)):
        pictures = [draw(kind, 0), draw(kind, turn), draw(kind, 0, (180, 180))]
        prints, _ = take_fingerprints([encode_jpeg(picture) for picture in pictures])
        assert not compare_fingerprints(prints[0], prints[1:]).are_copies().any(), kind
        for name, change in COPIES.items():
            if name != "marked":
                copies, _ = take_fingerprints([encode_jpeg(change(pictures[0], rng))])
                assert compare_fingerprints(prints[0], copies).are_copies().all(), (kind, name)


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["dedup", *arguments])
    return done.exit_code, " ".join(done.output.split())


def test_the_command_and_the_api_say_the_same(tmp_path: Path) -> None:
    made, _ = make(60, 20)
    output = made.write(tmp_path / "tags")
    code, said = run(output.uri, "--to", str(tmp_path / "one"))
    assert code == 0, said
    done: Deduplicated = sightline.open_output(output.uri).dedup(tmp_path / "two")
    assert f"{done.identical} identical and {done.copies} copies, {done.similar} similar; {done.keep} to keep" in said
    assert read_groups(tmp_path / "one") == read_groups(tmp_path / "two")
    code, said = run(output.uri, "--to", str(tmp_path / "one"), "--prefer", "newest")
    assert (code, "made with prefer largest, not newest" in said) == (2, True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("x")
    code, said = run(output.uri, "--to", str(tmp_path / "mine"))
    assert (code, "has no result of `sightline dedup`" in said) == (2, True)
    assert run(output.uri, "--to", str(tmp_path / "x"), "--copy", "1.5")[0] == 2
    assert run(output.uri, "--to", str(tmp_path / "x"), "--against", output.uri)[0] == 2
    assert not (tmp_path / "x").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"tags", "one", "two", "mine"}


def test_outputs_of_two_models_do_not_compare(tmp_path: Path) -> None:
    made, _ = make(10, 0)
    output = made.write(tmp_path / "tags")
    with pytest.raises(ConfigError, match="another model"):
        dedup_output(output, tmp_path / "result", replace(output, table=replace(output.table, weights="other")))


def test_a_mapped_array_gives_back_its_pages_and_keeps_its_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = mapped.read_mapped()
    monkeypatch.setattr(mapped, "HELD_BYTES", before + 8 * 2**20)
    array = mapped.MappedArray(tmp_path / "array", np.float32, (64, 2**18))  # a megabyte in each row
    largest = 0
    for row in range(64):
        array[row] = np.full(2**18, row)
        largest = max(largest, mapped.read_mapped())
    for row in np.random.default_rng(0).permutation(64).tolist():
        assert (array[[row]] == row).all()
        largest = max(largest, mapped.read_mapped())
    assert largest < before + 24 * 2**20
    monkeypatch.setattr(mapped, "_ROWS", 4)
    order = np.random.default_rng(1).permutation(64)
    assert (array[order][:, 5] == order).all()
    assert mapped.read_mapped() < before + 24 * 2**20
    assert not np.shares_memory(array[3:5], array[3:5])
    assert array[3:5, 7].tolist() == [3, 4]
    assert mapped.MappedArray(tmp_path / "empty", np.uint8, (0, 3))[:0].shape == (0, 3)
