"""The index: it finds the nearest images, has each image once, and what it does not know is searched exactly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

import sightline
from benchmarks.index import draw_images, draw_texts
from benchmarks.outputs import SyntheticOutput, write_output
from curation.index import build as build_module
from curation.index import recall as recall_module
from curation.index import search as search_module
from curation.index import table as table_module
from curation.index.build import Built, build_index
from curation.index.search import OpenIndex, search_index
from curation.index.state import list_shards, lock_index, read_index_state
from curation.index.table import IndexTable, name_shard
from curation.search.query import Query, Terms, embed_query
from curation.search.search import Results, search_output
from curation.tagged_output import TaggedOutput, open_output, read_embeddings
from pipelines.upkeep.compaction import compact_output
from pipelines.upkeep.verify import verify_output
from sightline.cli import app
from siglip.heads import LinearHead
from siglip.labels import LabelSet
from siglip.scoring import Scale
from storage.settings import ConfigError
from tests.support import growing_output
from tests.support.growing_output import GrowingOutput
from tests.support.jobs import RecordedProgress
from tests.support.vectors import draw_vectors

WIDTH, SHARDS, ROWS = 32, 12, 2000
NAMES = [f"text {number}" for number in range(40)]


def ids(results: Results) -> list[str]:
    return list(results.table["id"].to_pylist())


def rows_of(output: TaggedOutput) -> list[str]:
    """The ids of all rows of the version of the table that searches use."""
    state = read_index_state(output)
    assert state is not None
    table = IndexTable.open(output, state.about.version)
    found = table._table.search().select(["shard", "row"]).to_arrow().to_pylist()
    return sorted(f"{name_shard(row['shard'])}/{row['row']}" for row in found)


def expected_rows(output: TaggedOutput) -> list[str]:
    return sorted(output.to_arrow(["id"])["id"].to_pylist())


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module", params=["float32", "float16"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    """An output with enough images for a vector index, of many kinds, and with an index."""
    root = str(tmp_path_factory.mktemp("large") / "made")
    made = SyntheticOutput(
        LabelSet.model_validate({"names": NAMES, "threshold": 0.5}),
        draw_texts(len(NAMES), WIDTH, 5),
        SHARDS,
        lambda shard: draw_images(ROWS, WIDTH, 100 + shard),
        dtype=request.param,
        scale=Scale(117.33, -60.0),
    )
    write_output(root, made)
    output = open_output(root)
    built = build_index(output)
    assert built.trained == "there was no vector index"
    assert min(built.recall_images, built.recall_texts) >= 0.95
    return output


def test_the_nearest_images_of_texts_are_found_with_the_scores_of_an_exact_search(large: TaggedOutput) -> None:
    recalls = []
    for name in NAMES[:20]:
        query = Query([name], top=10, cutoff="none")
        exact, found = search_output(large, query), search_index(large, query)
        recalls.append(len({*ids(exact)} & {*ids(found)}) / 10)
        scores = dict(zip(ids(exact), exact.table["score"].to_pylist(), strict=True))
        for row in found.table.to_pylist():
            if row["id"] in scores:
                assert row["score"] == pytest.approx(scores[row["id"]], rel=1e-4)
        assert found.notes == ()
        assert found.table.schema == exact.table.schema
    assert np.mean(recalls) >= 0.95


def test_the_nearest_images_of_an_image_are_found_and_not_the_image_itself(large: TaggedOutput) -> None:
    recalls = []
    for number in range(0, SHARDS * ROWS, 1201):
        query = Query(like=[f"image {number:08d}"], top=10)
        exact, found = search_output(large, query), search_index(large, query)
        own = large.take([number], ["id"])["id"][0].as_py()
        assert own not in ids(found)
        assert len(ids(found)) == 10
        recalls.append(len({*ids(exact)} & {*ids(found)}) / 10)
    assert np.mean(recalls) >= 0.95


def test_the_cutoff_is_near_that_of_an_exact_search(large: TaggedOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "FOUND", 300)
    some = 0
    for name in NAMES[:12]:
        query = Query([name], top=5)
        exact, found = search_output(large, query), search_index(large, query)
        assert exact.relevant is not None
        assert found.relevant is not None
        assert found.relevant == pytest.approx(exact.relevant, rel=0.2, abs=12), name
        some += exact.relevant > 0
    assert some > 0


def test_folding_gives_one_of_each_group(large: TaggedOutput) -> None:
    query = Query([NAMES[3]], top=10, cutoff="none", fold=True)
    exact, found = search_output(large, query), search_index(large, query)
    assert len({*ids(exact)} & {*ids(found)}) >= 9


def test_the_nearest_images_with_a_label_are_found_however_few_have_it(large: TaggedOutput) -> None:
    """A condition that is applied after a search would leave few of the nearest images, or none."""
    counts = Counter(label for row in large.to_arrow(["labels"])["labels"].to_pylist() for label in row)
    by_count = [label for label, _ in counts.most_common()]
    recalls = []
    for label in (by_count[0], by_count[len(by_count) // 2], by_count[-1]):
        for name in NAMES[:6]:
            query = Query([name], labels=[label], top=10, cutoff="none")
            exact, found = search_output(large, query), search_index(large, query)
            assert (found.searched, found.rows) == (counts[label], large.rows) == (exact.searched, exact.rows)
            assert found.table.num_rows == exact.table.num_rows == min(10, counts[label])
            assert all(label in row for row in found.table["labels"].to_pylist())
            recalls.append(len({*ids(exact)} & {*ids(found)}) / exact.table.num_rows)
    assert np.mean(recalls) >= 0.95
    assert search_index(large, Query(["text 1"], labels=by_count[:2] + by_count[-2:])).notes == ()


def test_the_cutoff_is_that_of_the_images_with_the_label(large: TaggedOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "FOUND", 200)
    some = 0
    for name in NAMES[:12]:
        query = Query([name], labels=[name], top=5)
        exact, found = search_output(large, query), search_index(large, query)
        assert exact.relevant is not None
        assert found.relevant == pytest.approx(exact.relevant, rel=0.2, abs=12), name
        some += exact.relevant > 0
    assert some > 0


def test_unwanted_images_are_left_out_about_as_by_an_exact_search(large: TaggedOutput) -> None:
    recalls = []
    for name, other in zip(NAMES[:12], NAMES[12:24], strict=True):
        query = Query([name], without=[other], top=20, cutoff="none")
        exact, found = search_output(large, query), search_index(large, query)
        assert found.left_out == pytest.approx(exact.left_out, rel=0.25, abs=20)
        assert found.table.num_rows == 20
        recalls.append(len({*ids(exact)} & {*ids(found)}) / 20)
        assert found.notes == ()
    assert np.mean(recalls) >= 0.9


def test_more_images_are_looked_at_if_the_nearest_are_unwanted(
    large: TaggedOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unwanted text is the wanted one, so that all of the nearest images are left out."""
    monkeypatch.setattr(search_module, "FOUND", 50)
    query = Query([NAMES[0]], without=["the same"], top=20, cutoff="none")
    one = embed_query(Query([NAMES[0]]), large).head
    head = LinearHead(
        np.concatenate([one.vectors] * 2), np.concatenate([one.gain] * 2), np.concatenate([one.offset] * 2)
    )
    terms = Terms(head, 1, None, frozenset())
    state = read_index_state(large)
    assert state is not None
    index = OpenIndex.open(large, state)
    found = index.search(query, terms, list)
    assert (found.table.num_rows, found.notes) == (20, ())
    relevant = search_index(large, Query([NAMES[0]], top=1)).relevant
    assert found.left_out == pytest.approx(relevant, rel=0.2)
    assert relevant is not None
    assert relevant > 80, "none of those looked at first is a result"
    monkeypatch.setattr(search_module, "DEEPEST", 60)
    fewer = index.search(query, terms, list)
    assert (fewer.table.num_rows, "60 nearest images" in fewer.notes[0]) == (0, True)


def compose(large: TaggedOutput) -> list[Query]:
    """Queries of several texts, and of texts and an example, some of which are far apart."""
    queries = [Query([one, other], top=10, cutoff="none") for one, other in pairwise(NAMES[:9])]
    for number, name in enumerate(NAMES[:8]):
        nearest = ids(search_output(large, Query([name], top=300, cutoff="none")))
        queries.append(Query([name], like=[nearest[40 * number]], top=10, cutoff="none"))
    queries.append(Query(NAMES[:2], like=["image 00000007"], top=10, cutoff="none"))
    return queries


def test_several_texts_and_examples_are_composed_as_by_an_exact_search(large: TaggedOutput) -> None:
    recalls = []
    for query in compose(large):
        exact, found = search_output(large, query), search_index(large, query)
        scores = {row["id"]: (row["score"], row["similarity"]) for row in exact.table.to_pylist()}
        same = [row for row in found.table.to_pylist() if row["id"] in scores]
        for row in same:
            assert row["score"] == pytest.approx(scores[row["id"]][0], rel=1e-4)
            assert row["similarity"] == (None if not query.like else pytest.approx(scores[row["id"]][1], rel=1e-4))
        # Those that it does not find are none that it knows to be missing.
        assert len(found.table) == 10 or "there may be others" in found.notes[0]
        recalls.append(len(same) / max(1, len(found.table)))
        assert found.searched == exact.searched
    assert np.mean(recalls) >= 0.95


def test_the_cutoff_of_several_texts_is_near_that_of_an_exact_search(large: TaggedOutput) -> None:
    for one, other in zip(NAMES[:6], NAMES[6:12], strict=True):
        query = Query([one, other], top=20)
        exact, found = search_output(large, query), search_index(large, query)
        assert exact.relevant is not None
        assert found.relevant == pytest.approx(exact.relevant, rel=0.2, abs=12)
        assert found.best == pytest.approx(exact.best, rel=1e-3)


def test_what_ranks_above_all_that_was_not_found_is_shown_and_a_line_tells_of_the_rest(
    large: TaggedOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few rows of each list, an image that is only in one of them may rank below one that is in none."""
    monkeypatch.setattr(search_module, "DEEPEST", 100)
    monkeypatch.setattr(search_module, "FOUND", 10)
    short = 0
    for query in compose(large):
        exact, found = search_output(large, query), search_index(large, query)
        count = found.table.num_rows
        assert len({*ids(found)} & {*ids(exact)}) >= 0.9 * count
        short += count < 10
        assert bool(found.notes) == (count < 10)
    assert short > 0


@pytest.mark.parametrize(
    ("query", "why"),
    [
        (Query([NAMES[0]], where="width > 600"), "condition"),
        (Query([NAMES[0]], labels=[NAMES[1]], where="width > 600"), "condition"),
        (Query([NAMES[0]], top=3000), "up to 2,000"),
    ],
)
def test_what_the_index_cannot_answer_is_exact_and_said(large: TaggedOutput, query: Query, why: str) -> None:
    found = search_index(large, query)
    assert ids(found) == ids(search_output(large, query))
    assert why in found.notes[0]


def test_the_commands_and_the_python_api_use_the_index(large: TaggedOutput) -> None:
    code, said = run("index", large.uri)
    assert (code, "24,000 images in the index, 0 added" in said) == (0, True)
    code, said = run("search", large.uri, "--text", NAMES[0], "--cutoff", "none", "--index", "--where", "width > 1")
    assert (code, "without the index: a condition" in said) == (0, True)
    opened = sightline.open_output(large.uri)
    assert ids(opened.search(NAMES[0], index=True)) == ids(search_index(large, Query([NAMES[0]])))
    assert opened.index().added == 0
    assert verify_output(large.output).ok


def test_enough_is_found_after_each_of_several_growths_at_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later nights have other kinds of images than the first, on which the vector index was trained."""
    nights = [draw_images(20_000, WIDTH, 1)] + [-draw_images(5000, WIDTH, 2 + night) for night in range(3)]
    vectors = iter(np.concatenate(nights))
    texts = draw_texts(3, WIDTH, 7)
    monkeypatch.setattr(growing_output, "WIDTH", WIDTH)
    monkeypatch.setattr(
        growing_output, "draw_vectors", lambda rows, width, seed: next(vectors)[None] if rows == 1 else texts[:rows]
    )
    growing = GrowingOutput(tmp_path / "tags")
    rng = np.random.default_rng(1)
    for night, images in enumerate(nights):
        growing.grow(len(images) // 2500, 2500)
        output = open_output(str(growing.root))
        built = build_index(output)
        assert built.added == len(images)
        assert bool(built.trained) == (night == 0) or built.trained.startswith("only 0.")
        assert min(built.recall_images, built.recall_texts) >= 0.95
        recalls = []
        for place in rng.choice(output.rows, 15, replace=False).tolist():
            query = Query(like=output.take([place], ["id"])["id"].to_pylist(), top=10)
            recalls.append(len({*ids(search_output(output, query))} & {*ids(search_index(output, query))}) / 10)
        assert np.mean(recalls) >= 0.95


@pytest.fixture
def growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GrowingOutput:
    """An output of few rows, whose index is trained nevertheless, and takes several commits."""
    monkeypatch.setattr(build_module, "TRAINED_FROM", 300)
    monkeypatch.setattr(build_module, "_BATCHES_A_COMMIT", 1)
    monkeypatch.setattr(recall_module, "FEWEST_PROBES", 1)
    return GrowingOutput(tmp_path / "tags")


def build(growing: GrowingOutput) -> tuple[TaggedOutput, Built]:
    output = open_output(str(growing.root))
    built = build_index(output)
    assert rows_of(output) == expected_rows(output)
    growing.check()
    return output, built


def test_no_row_is_lost_or_doubled_by_growth_retry_and_compaction(growing: GrowingOutput) -> None:
    growing.grow(4, 100)
    _, built = build(growing)
    assert (built.rows, built.added, bool(built.trained)) == (400, 400, True)
    growing.grow(1, 100, rejected=[3, 50])
    _, built = build(growing)
    assert (built.added, built.removed, built.trained) == (98, 0, "")
    growing.retry()
    output, built = build(growing)
    assert (built.rows, built.added, built.removed) == (500, 100, 98)
    compact_output(output.output, RecordedProgress())
    output, built = build(growing)
    assert (built.rows, built.added, built.removed) == (500, 0, 0)
    growing.grow(5, 100)
    output, built = build(growing)
    assert built.trained == "there are twice as many images as before"
    assert min(built.recall_images, built.recall_texts) >= 0.95
    query = Query(["cat"], top=50, cutoff="none")
    assert ids(search_index(output, query)) == ids(search_output(output, query))
    labelled = Query(["dog"], top=20, cutoff="none", labels=["cat"])
    assert ids(search_index(output, labelled)) == ids(search_output(output, labelled))
    assert search_index(output, labelled).searched == output.rows


@pytest.mark.parametrize("change", ["grow", "retry", "compact"])
def test_images_that_are_not_in_the_index_yet_are_found_at_once(growing: GrowingOutput, change: str) -> None:
    growing.grow(4, 100, rejected=[5])
    build(growing)
    if change == "grow":
        growing.grow(1, 90)
    elif change == "retry":
        growing.retry()
    else:
        compact_output(growing.output, RecordedProgress())
    output = open_output(str(growing.root))
    for text in ("cat", "dog"):
        query = Query([text], top=1000, cutoff="none")
        exact, found = search_output(output, query), search_index(output, query)
        assert Counter(ids(found)) == Counter(ids(exact))
        assert ids(found)[:20] == ids(exact)[:20]
    count = {"grow": "90 images", "retry": "400 images", "compact": ""}[change]
    assert (count in found.notes[0]) if count else not found.notes


def test_a_search_of_an_earlier_state_of_the_output_ignores_what_came_later(growing: GrowingOutput) -> None:
    growing.grow(3, 120)
    early = open_output(str(growing.root))
    growing.grow(1, 50)
    build(growing)
    query = Query(["cat"], top=1000, cutoff="none")
    assert ids(search_index(early, query)) == ids(search_output(early, query))


def test_the_index_is_trained_anew_when_it_finds_too_little(
    growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing.grow(8, 100)
    build(growing)
    growing.grow(1, 30)
    measured = iter([(0.9, 1.0), (0.98, 1.0), (0.98, 1.0)])
    monkeypatch.setattr(build_module, "measure_recall", lambda *arguments: next(measured))
    _, built = build(growing)
    assert built.trained == "only 0.900 of the nearest images were found"
    assert built.recall_images == 0.98


KILLED = """
    import os, signal, sys
    from curation.index import build
    from curation.index.table import IndexTable
    from curation.tagged_output import open_output

    build._BATCHES_A_COMMIT = 1
    step, add = sys.argv[2], IndexTable.add
    def kill(*arguments, **named):
        os.kill(os.getpid(), signal.SIGKILL)
    def add_some(self, batches, done=[]):
        if len(done) == 2:
            kill()
        done.append(add(self, batches))
    if step == "add":
        IndexTable.add = add_some
    else:
        setattr(IndexTable, step, kill)
    build.TRAINED_FROM = 300
    build.build_index(open_output(sys.argv[1]))
"""


@pytest.mark.parametrize("step", ["add", "train", "clean"])
def test_a_killed_build_leaves_the_earlier_index_and_the_next_one_goes_on(growing: GrowingOutput, step: str) -> None:
    growing.grow(4, 100)
    output, _ = build(growing)
    growing.grow(6, 100)
    code = textwrap.dedent(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code, str(growing.root), step], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert rows_of(output) == expected_rows(open_output(str(growing.root)) if step == "clean" else output)
    later = open_output(str(growing.root))
    query = Query(["dog"], top=1000, cutoff="none")
    assert ids(search_index(later, query)) == ids(search_output(later, query))
    _, built = build(growing)
    assert built.rows == 1000
    assert built.added == {"add": 400}.get(step, 0)


def test_doubled_rows_are_found_once_and_repaired(growing: GrowingOutput) -> None:
    growing.grow(4, 100)
    output, _ = build(growing)
    table = IndexTable.open(output)
    [shard] = [shard for shard in list_shards(output) if name_shard(shard).endswith("-000000")]
    table.add(build_module._read(output, {name_shard(shard): 0}, table.schema))
    assert table.rows == 500
    assert len(table.find(output.head.vectors[0], 1000, 100).rows) == 400
    _, built = build(growing)
    assert (built.rows, built.removed, built.added) == (400, 200, 100)


def test_two_builds_at_once_are_refused_and_the_lock_of_a_dead_one_is_not(growing: GrowingOutput) -> None:
    growing.grow(2, 20)
    output = open_output(str(growing.root))
    with lock_index(output):
        code, said = run("index", output.uri)
        assert (code, "another `sightline index`" in said, "Traceback" in said) == (2, True, False)
    dead = subprocess.run(
        [sys.executable, "-c", textwrap.dedent("""
            import os, signal, sys
            from curation.index.state import lock_index
            from curation.tagged_output import open_output
            with lock_index(open_output(sys.argv[1])):
                os.kill(os.getpid(), signal.SIGKILL)
        """), output.uri],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}, check=False,
    )  # fmt: skip
    assert dead.returncode == -signal.SIGKILL
    build(growing)


def test_old_versions_are_deleted_and_a_reader_of_the_last_but_one_goes_on(
    growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing.grow(4, 100)
    output, _ = build(growing)
    state = read_index_state(output)
    assert state is not None
    reader = IndexTable.open(output, state.about.version)
    growing.grow(1, 30)
    build(growing)
    assert len(reader.find(output.head.vectors[0], 1000, 100).rows) == 400
    table = IndexTable.open(output)
    monkeypatch.setattr(table_module, "_MARGIN", timedelta(0))
    table.clean(table.version)
    assert [about["version"] for about in table._table.list_versions()] == [table.version]


def test_without_lancedb_and_without_an_index_one_line_says_what_to_do(
    growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing.grow(1, 5)
    code, said = run("search", str(growing.root), "--text", "cat", "--index")
    assert (code, "sightline index" in said) == (2, True)
    monkeypatch.setitem(sys.modules, "lancedb", None)
    code, said = run("index", str(growing.root))
    assert (code, "pip install 'sightline[lancedb]'" in said) == (2, True)
    assert not (growing.root / "index").exists()


def test_the_index_of_another_output_is_refused(growing: GrowingOutput, tmp_path: Path) -> None:
    growing.grow(1, 5)
    build(growing)
    other = tmp_path / "other"
    labels = LabelSet.model_validate({"names": ["cat"], "threshold": 0.5})
    write_output(str(other), SyntheticOutput(labels, draw_vectors(1, 4, 1), 1, lambda shard: draw_vectors(5, 4, 1)))
    (growing.root / "index").rename(other / "index")
    with pytest.raises(ConfigError, match="index of another output"):
        search_index(open_output(str(other)), Query(["cat"]))


def test_an_index_of_an_earlier_version_is_refused_and_made_anew(
    growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing.grow(4, 100)
    short = pa.schema([("shard", pa.int64()), ("generation", pa.int16()), ("row", pa.int64())])
    output = open_output(str(growing.root))
    build_index(output)
    state = read_index_state(output)
    assert state is not None
    table_module.import_lancedb().connect(str(growing.root / "index")).create_table(
        "images", schema=short, mode="overwrite"
    )
    replace(state, about=replace(state.about, format=1)).write(output)
    with pytest.raises(ConfigError, match=r"run `sightline index .*makes it anew"):
        search_index(output, Query(["cat"]))
    _, built = build(growing)
    assert (built.rows, built.added) == (400, 400)
    query = Query(["cat"], top=50, cutoff="none")
    assert ids(search_index(output, query)) == ids(search_output(output, query))


def test_rows_are_found_by_key_whatever_characters_it_has(tmp_path: Path) -> None:
    keys = ["it's", "a' OR '1'='1", "back\\slash", 'quote"', "%", "снег ☃", "new\nline", "' --", ""]
    labels = LabelSet.model_validate({"names": ["cat"], "threshold": 0.5})
    made = SyntheticOutput(labels, draw_vectors(1, 4, 1), 1, lambda shard: draw_vectors(9, 4, 1), key=keys.__getitem__)
    write_output(str(tmp_path / "tags"), made)
    output = open_output(str(tmp_path / "tags"))
    build_index(output)
    table = IndexTable.open(output)
    for row, key in enumerate(keys):
        assert table.find_key(key) == [(0, row)]
    assert table.find_key("none such' OR true") == []
    assert table.find_key(keys[0], without=[0]) == []


def test_positions_are_found_by_id(large: TaggedOutput) -> None:
    places = [0, 1999, 2000, 23_999, 5, 5]
    names: Any = large.take(places, ["id"])["id"].to_pylist()
    assert large.find_positions([*names, "000000-000000/99999"]).tolist() == [*places, -1]
    batches = list(large.shard_batches({"000000-000003"}, ["row", "embedding"]))
    assert batches[0][:2] == ("000000-000003", 3 * ROWS)
    assert np.array_equal(
        read_embeddings(batches[0][2])[:5],
        read_embeddings(large.take(range(3 * ROWS, 3 * ROWS + 5), ["embedding"])),
    )
