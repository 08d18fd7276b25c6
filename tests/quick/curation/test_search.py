"""Search: the same rows in the same order as brute force in NumPy, whatever is combined, and where the results end."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import sightline
from benchmarks.outputs import SCALE, SyntheticOutput, write_output
from curation.search import search as search_module
from curation.search.cutoff import IRRELEVANT, SURE, TRAINING_SHARE, LogitCounts
from curation.search.folding import FOLD_COSINE
from curation.search.query import Query
from curation.search.search import Results, search_output
from curation.tagged_output import TaggedOutput, open_output, read_embeddings
from sightline.cli import app
from siglip.labels import LabelSet
from siglip.scoring import Floats
from storage.settings import ConfigError
from tests.support.vectors import draw_vectors

NAMES = ["cat", "dog", "bird", "tree"]
WIDTH, SHARDS = 16, (150, 1, 260, 90)
TEXTS = draw_vectors(len(NAMES), WIDTH, 1)


def embed(shard: int) -> Floats:
    """Embeddings, a tenth of which are close to one of the texts, and a tenth close to the row before."""
    vectors = draw_vectors(SHARDS[shard], WIDTH, 10 + shard)
    rng = np.random.default_rng(shard)
    for row in range(len(vectors)):
        if row % 10 == 3:
            vectors[row] = TEXTS[rng.integers(len(TEXTS))] * 0.25 + vectors[row]
        if row % 10 == 7:
            vectors[row] = vectors[row - 1] + 0.05 * vectors[row]
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


@pytest.fixture(scope="module", params=["float32", "float16"])
def output(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    root = str(tmp_path_factory.mktemp("search") / "made")
    labels = LabelSet.model_validate({"names": NAMES, "threshold": 1e-5, "top_k": None})
    made = SyntheticOutput(
        labels, TEXTS, len(SHARDS), embed, dtype=request.param, thumbnail=lambda row: b"jpeg %d" % row,
        key=lambda row: "the same" if row in (5, 400) else f"image {row}",
    )  # fmt: skip
    write_output(root, made)
    return open_output(root)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "_CHUNK", 64)


def read_all(output: TaggedOutput) -> tuple[Floats, list[dict[str, Any]]]:
    embeddings = np.concatenate([read_embeddings(batch) for batch in output.batches(["embedding"])])
    return embeddings, output.to_arrow(["id", "key", "labels", "width"]).to_pylist()


def logits_of(embeddings: Floats, name: str) -> Floats:
    cosines = np.array([row @ TEXTS[NAMES.index(name)] for row in embeddings.astype(np.float64)])
    return np.asarray(SCALE.logit_scale * cosines + SCALE.logit_bias)


def ids(results: Results) -> list[str]:
    return list(results.table["id"].to_pylist())


def expect(rows: list[dict[str, Any]], scores: Floats, kept: np.ndarray, top: int) -> list[str]:
    order = [place for place in np.argsort(-scores, kind="stable") if kept[place]]
    return [rows[place]["id"] for place in order[:top]]


@pytest.mark.parametrize("top", [1, 7, 100, 10_000])
def test_a_text_gives_the_rows_of_brute_force(output: TaggedOutput, top: int) -> None:
    embeddings, rows = read_all(output)
    scores = logits_of(embeddings, "dog")
    results = search_output(output, Query(texts=["dog"], top=top, cutoff="none"))
    assert ids(results) == expect(rows, scores, np.ones(len(rows), bool), top)
    assert results.table["rank"].to_pylist() == list(range(1, min(top, len(rows)) + 1))
    found = np.array(results.table["score"].to_pylist())
    assert np.allclose(found, 1 / (1 + np.exp(-np.sort(scores)[::-1][:top])), atol=1e-5)
    assert (results.rows, results.searched, results.relevant) == (len(rows), len(rows), None)
    assert results.best == pytest.approx(found[0])


def test_a_text_has_the_score_of_the_label_of_this_name(output: TaggedOutput) -> None:
    table = search_output(output, Query(texts=["bird"], top=1000, cutoff="none")).table
    for row in table.to_pylist():
        if "bird" in row["labels"]:
            assert row["score"] == pytest.approx(
                row["scores"][row["labels"].index("bird")],
                abs=1e-5 if output.fingerprint["embedding_dtype"] == "float32" else 1e-2,
            )


def test_several_texts_are_as_good_as_the_worst(output: TaggedOutput) -> None:
    embeddings, rows = read_all(output)
    scores = np.minimum(logits_of(embeddings, "dog"), logits_of(embeddings, "tree"))
    results = search_output(output, Query(texts=["tree", "dog", "tree"], top=50, cutoff="none"))
    assert ids(results) == expect(rows, scores, np.ones(len(rows), bool), 50)


def test_conditions_labels_and_unwanted_texts(output: TaggedOutput) -> None:
    embeddings, rows = read_all(output)
    dog, cat = logits_of(embeddings, "dog"), logits_of(embeddings, "cat")
    kept = np.array(["tree" in row["labels"] and not row["key"].endswith("1") for row in rows])
    counts = LogitCounts()
    counts.add(cat[kept])
    wanted = kept & ~(cat > counts.find_cutoff(TRAINING_SHARE))
    assert 0 < wanted.sum() < kept.sum()
    query = Query(["dog"], without=["cat"], where="key not like '%1'", labels=["tree"], top=30, cutoff="none")
    results = search_output(output, query)
    assert ids(results) == expect(rows, dog, wanted, 30)
    assert (results.searched, results.left_out) == (kept.sum(), kept.sum() - wanted.sum())
    # The cut-off depends on the rows that are searched.
    counts = LogitCounts()
    counts.add(dog[kept])
    limit = counts.find_cutoff(TRAINING_SHARE)
    results = search_output(
        output, Query(["dog"], without=["cat"], where="key not like '%1'", labels=["tree"], top=10_000)
    )
    assert ids(results) == expect(rows, dog, wanted & (dog > limit), 10_000)
    assert results.relevant == len(ids(results)) == int((wanted & (dog > limit)).sum())


def test_examples_are_averaged_and_not_found_themselves(output: TaggedOutput) -> None:
    embeddings, rows = read_all(output)
    places = [17, 333]
    example = embeddings[places].astype(np.float64).mean(axis=0)
    scores = embeddings.astype(np.float64) @ (example / np.linalg.norm(example))
    kept = np.ones(len(rows), bool)
    kept[places] = False
    like = [rows[17]["key"], rows[333]["id"]]
    results = search_output(output, Query(like=like, top=40))
    assert ids(results) == expect(rows, scores, kept, 40)
    assert results.relevant is None
    assert results.table["score"].null_count == 40
    assert np.allclose(results.table["similarity"].to_pylist(), np.sort(scores[kept])[::-1][:40], atol=1e-4)


def test_a_text_and_an_example_are_ordered_by_the_worse_of_both(output: TaggedOutput) -> None:
    embeddings, rows = read_all(output)
    kept = np.array([row["key"] != "image 20" for row in rows])
    two = np.stack([logits_of(embeddings, "cat"), embeddings.astype(np.float64) @ embeddings[20]])
    scores = ((two - two.mean(axis=1, keepdims=True)) / two.std(axis=1, keepdims=True)).min(axis=0)
    results = search_output(output, Query(["cat"], like=["image 20"], top=25, cutoff="none"))
    assert ids(results) == expect(rows, scores, kept, 25)


def test_folded_results_are_no_near_duplicates_of_each_other(output: TaggedOutput) -> None:
    embeddings, rows = read_all(output)
    by_id = {row["id"]: vector for row, vector in zip(rows, embeddings, strict=True)}
    results = search_output(output, Query(["dog"], top=501, cutoff="none", fold=True))
    found = np.stack([by_id[id_] for id_ in ids(results)])
    cosines = found @ found.T - np.eye(len(found))
    assert cosines.max() < FOLD_COSINE
    assert len(found) + sum(results.table["copies"].to_pylist()) == len(rows)
    assert sum(results.table["copies"].to_pylist()) > 20
    few = search_output(output, Query(["dog"], top=5, cutoff="none", fold=True))
    assert ids(few) == ids(results)[:5]


@pytest.mark.parametrize(
    ("query", "says"),
    [
        (Query(), "at least one --text"),
        (Query(without=["cat"], where="true"), "at least one --text"),
        (Query(["cat"], top=0), "--top 0"),
        (Query(["cat"], labels=["car"]), "no such label"),
        (Query(["cat"], without=["cat"]), "both wanted"),
        (Query(["cat"], where="color = 1"), "color"),
        (Query(like=["image 9999"]), "no image with this key"),
        (Query(like=["the same"]), "2 images have this key"),
        (Query([""]), "a text is empty"),
        (Query(["something else"]), "made-up"),
        (Query(images=[Path("not there.jpg")]), "not there.jpg"),
    ],
    ids=str,
)
def test_what_cannot_be_searched_is_refused_in_one_line(output: TaggedOutput, query: Query, says: str) -> None:
    from siglip.checkpoints.files import CheckpointError
    from siglip.labels import LabelError

    with pytest.raises((ConfigError, LabelError, CheckpointError)) as error:
        search_output(output, query)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_conditions_that_no_row_satisfies(output: TaggedOutput) -> None:
    for query in (Query(["cat"], where="false"), Query(like=["image 7"], where="false", fold=True)):
        results = search_output(output, query)
        assert (results.table.num_rows, results.searched, results.best) == (0, 0, None)


def draw_logits(right: int, wrong: int, seed: int, mean: float = -1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of right and wrong images, as SigLIP's usually are: low, and with a long tail."""
    rng = np.random.default_rng(seed)
    return rng.normal(mean, 1.5, right), rng.gumbel(-15, 1.0, wrong)


@pytest.mark.parametrize(("right", "wrong"), [(3000, 7000), (300, 10_000), (30, 10_000), (5, 2000)])
def test_the_cutoff_depends_on_how_many_images_are_relevant(right: int, wrong: int) -> None:
    counts = LogitCounts()
    ours, others = draw_logits(right, wrong, right)
    counts.add(ours)
    counts.add(others)
    share = counts.estimate_share(TRAINING_SHARE)
    assert share == pytest.approx(right / (right + wrong), rel=0.4)
    cutoff = counts.find_cutoff(TRAINING_SHARE)
    assert (ours > cutoff).mean() >= 0.8
    assert (others > cutoff).sum() <= max(1, 0.1 * right)


def test_nothing_is_relevant_where_all_scores_are_low() -> None:
    for seed in range(40):
        counts = LogitCounts()
        others = draw_logits(0, 5000, seed)[1]
        counts.add(others)
        assert not (others > counts.find_cutoff(TRAINING_SHARE)).any()


def test_an_image_with_a_high_score_is_relevant_among_a_million() -> None:
    counts = LogitCounts()
    counts.add(np.full(1_000_000, -20.0))
    counts.add(np.array([3.0]))
    assert counts.find_cutoff(TRAINING_SHARE) <= np.log(SURE / (1 - SURE)) < 3


def test_the_estimate_is_the_most_likely_share() -> None:
    logits = np.concatenate(draw_logits(70, 4000, 3))
    counts = LogitCounts()
    counts.add(logits)
    ratio = np.append(np.exp(logits) * (1 - TRAINING_SHARE) / TRAINING_SHARE, np.zeros(IRRELEVANT))
    shares = np.geomspace(1e-5, 0.5, 4000)
    likelihood = [np.log1p(share * (ratio - 1)).sum() for share in shares]
    assert counts.estimate_share(TRAINING_SHARE) == pytest.approx(shares[int(np.argmax(likelihood))], rel=0.02)


@pytest.mark.parametrize("logits", [[], [-1e9], [1e9], [0.0, 0.0], [100.0] * 5])
def test_extreme_logits_have_a_cutoff(logits: list[float]) -> None:
    counts = LogitCounts()
    counts.add(np.array(logits))
    assert counts.find_cutoff(TRAINING_SHARE) <= np.log(SURE / (1 - SURE)) + 1e-9


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["search", *arguments])
    return done.exit_code, done.output


def test_results_are_written_to_files_and_folders(output: TaggedOutput, tmp_path: Path) -> None:
    wanted = search_output(output, Query(["dog"], top=12, cutoff="none")).table
    readers: dict[str, Callable[[Path], list[str]]] = {
        ".csv": lambda path: [row["id"] for row in csv.DictReader(path.read_text().split("\n"))],
        ".jsonl": lambda path: [json.loads(line)["id"] for line in path.read_text().split("\n")[:-1]],
        ".parquet": lambda path: list(pq.read_table(path)["id"].to_pylist()),
        ".txt": lambda path: path.read_text().splitlines(),
    }
    for suffix, read in readers.items():
        target = tmp_path / f"found{suffix}"
        code, said = run(output.uri, "--text", "dog", "--top", "12", "--cutoff", "none", "--to", str(target))
        assert code == 0, said
        assert read(target) == wanted["id"].to_pylist()
    assert pq.read_table(tmp_path / "found.parquet").equals(wanted)
    code, said = run(output.uri, "--text", "dog", "--top", "12", "--cutoff", "none", "--to", str(tmp_path / "folder"))
    assert code == 0, said
    files = sorted(path.name for path in (tmp_path / "folder").glob("*.jpg"))
    assert files == [f"{rank:02}.jpg" for rank in range(1, 13)]
    numbers = [int(path.read_bytes().split()[1]) for path in sorted((tmp_path / "folder").glob("*.jpg"))]
    assert numbers == [int(one) for one in search_output(output, Query(["dog"], top=12, cutoff="none")).positions]
    code, said = run(output.uri, "--text", "dog", "--to", str(tmp_path / "folder"))
    assert (code, "not an empty folder" in said) == (2, True)
    code, said = run(output.uri, "--text", "dog", "--to", str(tmp_path / "found.xlsx"))
    assert (code, ".parquet" in said) == (2, True)


def test_the_command_says_how_many_are_relevant(output: TaggedOutput) -> None:
    results = search_output(output, Query(["dog"], top=3))
    code, said = run(output.uri, "--text", "dog", "--top", "3")
    assert code == 0
    assert f"{results.relevant} are relevant" in said
    assert "the first 3 are shown" in said
    worst = search_output(output, Query(["dog"], top=501, cutoff="none")).table["id"][-1].as_py()
    code, said = run(output.uri, "--text", "dog", "--where", f"id = '{worst}'")
    assert (code, "nothing here is relevant" in said) == (0, True)
    assert "1 image searched of 501" in said


def test_the_command_says_what_is_left_out_and_why(output: TaggedOutput, tmp_path: Path) -> None:
    code, said = run(output.uri, "--text", "dog", "--where", "key = 'nobody'")
    assert (code, "no image of 501 satisfies the conditions" in said) == (0, True)
    code, said = run(output.uri, "--text", "dog", "--not", "Dog")  # SigLIP reads both as the same text
    assert (code, "all relevant images are left out" in said, "best score" in said) == (0, True, False)
    folded = search_output(output, Query(["dog"], top=501, cutoff="none", fold=True))
    count = 501 - folded.table.num_rows
    assert count > 0
    target = str(tmp_path / "found.txt")
    code, said = run(output.uri, "--text", "dog", "--top", "501", "--cutoff", "none", "--fold", "--to", target)
    assert (code, f"{count} near-duplicates of them are folded" in said) == (0, True)


@pytest.mark.parametrize("target", ["/proc/found.csv", "/proc/found", "folder.csv"])
def test_results_that_cannot_be_written_are_refused_before_the_search(
    output: TaggedOutput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.csv").mkdir()
    code, said = run(output.uri, "--text", "dog", "--to", target)
    assert (code, f"--to {target}" in said) == (2, True)
    assert "searching" not in said


def test_the_python_api_searches_too(output: TaggedOutput) -> None:
    opened = sightline.open_output(output.uri)
    assert ids(opened.search("dog", top=9)) == ids(search_output(output, Query(["dog"], top=9)))
    assert len(opened.to_pandas(["key"])) == output.rows
    with pytest.raises(ConfigError, match="at least one"):
        opened.search()
