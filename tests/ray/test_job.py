"""The whole job on a local Ray: the output, later runs over the same output, and the size of the actor pool."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import psutil
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import ray
from datasets import load_dataset
from PIL import Image

from curation.tagged_output import open_output
from pipelines.cluster import connect
from pipelines.config import JobConfig, load_config
from pipelines.job import Outcome, run_job
from pipelines.output.ledger import Ledger
from pipelines.output.output import Output
from pipelines.sizing import Cluster
from pipelines.upkeep.verify import Report, verify_output
from sightline.demo.dataset import CONFIG, encode_image, render_dataset
from sightline.demo.shapes import LABELS
from siglip.checkpoints.architectures import ARCHITECTURES, init_checkpoint
from siglip.checkpoints.files import TINY
from storage.schemes import open_store
from storage.settings import ConfigError
from storage.store import StoreOptions
from tests.support.jobs import SHARE, Place, RecordedProgress, make_image
from tests.support.stores.radosgw import Radosgw
from tests.support.tars import make_tar
from tests.support.workers import find_decoders, find_workers

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    # Threads and files of Ray Data outlive a run.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def run(config: JobConfig) -> Outcome:
    return run_job(config, RecordedProgress())


def verify(config: JobConfig) -> Report:
    return verify_output(Output(config.output))


def demo_config(folder: Path, **overrides: Any) -> JobConfig:
    keys = {"input": str(folder / "input"), "output": str(folder / "output"), **SHARE, **overrides}
    return load_config(CONFIG, keys)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> tuple[JobConfig, Outcome]:
    """The configuration and the outcome of a job over the demo's dataset."""
    folder = tmp_path_factory.mktemp("demo")
    render_dataset(folder / "input")
    config = demo_config(folder)
    return config, run(config)


def test_every_row_is_there_once(demo: tuple[JobConfig, Outcome]) -> None:
    config, outcome = demo
    report = verify(config)
    assert report.ok, report.problems
    assert (report.rows_in, report.rows_tagged, report.rows_rejected) == (612, 607, 5)
    assert outcome.manifest["rows_in"] == 612
    assert outcome.plan.skipped.counts == Counter({".md files": 1})


def test_rejected_rows_have_their_stage_and_reason(demo: tuple[JobConfig, Outcome]) -> None:
    config, outcome = demo
    rejects = pyarrow.dataset.dataset(f"{config.output}/rejects").to_table().to_pylist()
    assert {(r["key"], r["stage"], r["reason"]) for r in rejects} == {
        ("broken/empty.jpg", "decode", "empty"),
        ("broken/page.png", "decode", "not_an_image"),
        ("broken/truncated.jpg", "decode", "truncated"),
        ("broken/108 megapixels.png", "decode", "too_many_pixels"),
        ("broken/ends early.tar", "read", "truncated_archive"),
    }
    assert outcome.manifest["reasons"] == Counter(r["reason"] for r in rejects)


def test_labels_are_correct(demo: tuple[JobConfig, Outcome]) -> None:
    config, _ = demo
    table = pyarrow.dataset.dataset(f"{config.output}/data").to_table()
    truth = {}
    for row in table.select(["key", "source", "metadata"]).to_pylist():
        if row["metadata"]:
            truth[row["source"], row["key"]] = json.loads(row["metadata"])["json"]["caption"].removeprefix("a ")
        elif "/loose/" in row["source"]:
            truth[row["source"], row["key"]] = Path(row["key"]).stem.rpartition(" ")[0]
    found = {(r["source"], r["key"]): r["labels"][:1] for r in table.select(["key", "source", "labels"]).to_pylist()}
    assert len(truth) == 486
    assert np.mean([found[where] == [label] for where, label in truth.items()]) >= 0.97


def test_duckdb_polars_and_datasets_read_the_output(demo: tuple[JobConfig, Outcome]) -> None:
    config, _ = demo
    data = f"{config.output}/data"
    table = pyarrow.dataset.dataset(data).to_table()
    assert [(f.name, str(f.type)) for f in table.schema] == [
        ("key", "string"),
        ("source", "string"),
        ("row", "int64"),
        ("width", "int32"),
        ("height", "int32"),
        ("labels", "list<element: string>"),
        ("scores", "list<element: float>"),
        ("sha256", "string"),
        ("embedding", "fixed_size_list<element: float>[128]"),
        ("metadata", "string"),
        ("thumbnail", "binary"),
    ]
    vectors = np.stack(table["embedding"].to_numpy(zero_copy_only=False))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for row in table.slice(0, 50).to_pylist():
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert len(row["labels"]) == len(row["scores"]) <= 3
        assert all(score >= 0.2 for score in row["scores"])
    files = f"{data}/**/*.parquet"
    assert duckdb.sql(f"select count(distinct (source, key, row)) from read_parquet('{files}')").fetchall() == [(607,)]
    assert polars.read_parquet(f"{data}/*.parquet").height == 607
    hub = load_dataset(
        "parquet", data_files=f"{data}/*.parquet", split="train", cache_dir=str(Path(config.output).parent / "hf")
    )
    assert len(hub) == 607
    assert hub[0]["labels"] == table["labels"][0].as_py()


def test_the_manifest_contains_the_runs_report(demo: tuple[JobConfig, Outcome]) -> None:
    config, outcome = demo
    manifest = json.loads(Path(config.output, "manifest.json").read_text())
    assert manifest == outcome.manifest
    report = manifest["run"]
    assert set(report["stage_seconds"]) == {"read", "decode", "queue", "model", "write"}
    assert report["rows"] == 612
    assert report["images_per_second"] > 0
    assert report["limited_by"] is None  # too short to know
    assert set(report["busy"]) == {"read", "decode", "model", "write"}
    assert manifest["shards"] == 6
    files = [file for _, file in Ledger.read(Output(config.output)).list_files()]
    assert len(files) == 6 + len(list(Path(config.output, "rejects").iterdir()))
    assert sum(file.rows for file in files) == 612
    assert len((Path(config.output) / "manifest.json").read_bytes()) < 8000


def test_a_later_run_tags_only_new_inputs(
    tmp_path: Path, demo: tuple[JobConfig, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(Path(demo[0].output).parent, tmp_path / "demo")
    # Copied files have other modification times, so they are new inputs. They need a new output.
    shutil.rmtree(tmp_path / "demo/output")
    config = demo_config(tmp_path / "demo")
    run(config)
    before = sorted(Path(config.output).rglob("*.parquet"))
    again = run(config)
    assert (again.new_shards, again.plan.inputs) == (0, 0)
    assert sorted(Path(config.output).rglob("*.parquet")) == before
    rng = random.Random(5)
    for number in range(3):
        path = Path(config.input[0], "loose", f"new {number}.jpg")
        path.write_bytes(encode_image(rng, LABELS[number]))
    shutil.copy(Path(config.input[0], "shards/shapes-000.tar"), Path(config.input[0], "shards/shapes-new.tar"))
    with monkeypatch.context() as patch:
        patch.delattr("pipelines.startup._embed_labels")  # a later run reads the labels' embeddings in the output
        added = run(config)
    assert (added.plan.inputs, added.manifest["run"]["rows"]) == (4, 103)
    assert set(before) < set(Path(config.output).rglob("*.parquet"))
    report = verify(config)
    assert report.ok, report.problems
    assert report.rows_in == 612 + 103
    for key, value, field in (
        ("labels", ["cat"], "labels.names"),
        ("labels.top_k", 1, "labels.top_k"),
        ("embedding_dtype", "float16", "embedding_dtype"),
        ("decode", "fast", "decode"),
    ):
        with pytest.raises(ConfigError, match=field):
            run(demo_config(tmp_path / "demo", **{key: value}))
    init_checkpoint(tmp_path / "other", "tiny", seed=1)
    with pytest.raises(ConfigError, match=r"model\.weights"):
        run(demo_config(tmp_path / "demo", **{"model.source": str(tmp_path / "other")}))
    assert verify(config).ok
    shutil.copy(Path(config.input[0], "shards/shapes-000.tar"), Path(config.input[0], "shards/shapes-newer.tar"))
    with pytest.raises(ConfigError, match=r"model\.device: cuda: CUDA does not work here"):
        run(demo_config(tmp_path / "demo", **{"model.device": "cuda"}))


def test_verify_detects_every_kind_of_damage(tmp_path: Path, demo: tuple[JobConfig, Outcome]) -> None:
    original = Path(demo[0].output)

    def broken(name: str) -> Path:
        shutil.copytree(original, tmp_path / name)
        return tmp_path / name

    def check(path: Path, remove_orphans: bool = False) -> Report:
        return verify_output(Output(str(path)), remove_orphans=remove_orphans)

    assert check(broken("copy")).ok
    victim = broken("deleted file")
    next(victim.glob("data/*.parquet")).unlink()
    report = check(victim)
    assert not report.ok
    assert report.missing > 50
    victim = broken("deleted commit")
    next(victim.glob("commits/*.json")).unlink()
    assert any("commit record" in problem and "is gone" in problem for problem in check(victim).problems)
    victim = broken("deleted commit of a run that was killed")
    next(victim.glob("commits/*.json")).unlink()
    shutil.rmtree(victim / "ledger")
    report = check(victim)
    assert not report.ok
    assert report.missing > 50
    assert report.orphans >= 1
    victim = broken("flipped byte")
    path = next(victim.glob("data/*.parquet"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert any("SHA-256 differs" in problem for problem in check(victim).problems)
    victim = broken("doubled rows")
    shutil.rmtree(victim / "ledger")
    commit = next(victim.glob("commits/*.json"))
    record = json.loads(commit.read_text())
    record["files"].append(record["files"][0])
    commit.write_text(json.dumps(record))
    report = check(victim)
    assert not report.ok
    assert report.duplicates > 50
    victim = broken("no manifest")
    (victim / "manifest.json").unlink()
    assert not check(victim).ok
    victim = broken("orphan")
    shutil.copy(next(victim.glob("data/*.parquet")), victim / "data/000000-000000-0123456789ab.parquet")
    report = check(victim)
    assert not report.ok
    assert (report.orphans, report.duplicates) == (1, 0)
    assert check(victim, remove_orphans=True).orphans_removed == 1
    assert check(victim).ok


def test_columns_thumbnails_and_half_precision(tmp_path: Path) -> None:
    rng = random.Random(1)
    images = [encode_image(rng, LABELS[n]) for n in range(12)]
    table = pa.table({"image": images, "id": pa.array(range(12), pa.int16()), "tags": [[str(n)] for n in range(12)]})
    (tmp_path / "input").mkdir()
    pq.write_table(table, tmp_path / "input/a.parquet", row_group_size=4)
    (tmp_path / "input/loose.jpg").write_bytes(images[0])
    overrides = {
        "parquet.columns": ["id", "tags"],
        "thumbnails": True,
        "embedding_dtype": "float16",
        "rows_per_shard": 4,
    }
    config = demo_config(tmp_path, **overrides)
    run(config)
    found = pyarrow.dataset.dataset(f"{config.output}/data").to_table()
    assert found.schema.field("id").type == pa.int16()
    assert found.schema.field("embedding").type == pa.list_(pa.float16(), 128)
    rows = {row["key"]: row for row in found.to_pylist()}
    assert len(rows) == 13
    for number in range(12):
        row = rows[str(number)]
        assert (row["id"], row["tags"]) == (number, [str(number)])
        assert row["labels"][0] == LABELS[number]
        assert row["thumbnail"].startswith(b"\xff\xd8")
    assert rows["loose.jpg"]["id"] is None
    assert verify(config).ok
    assert run(config).new_shards == 0
    with pytest.raises(ConfigError, match="no Parquet input has a column 'colour'"):
        run(demo_config(tmp_path, **{**overrides, "output": str(tmp_path / "o2"), "parquet.columns": ["colour"]}))


def test_an_input_without_images_is_committed(tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    (tmp_path / "input/empty.tar").write_bytes(bytes(10240))
    config = demo_config(tmp_path)
    assert run(config).manifest["rows_in"] == 0
    assert verify(config).ok


def test_shards_are_committed_while_others_are_read(tmp_path: Path) -> None:
    shards = 20
    rng = random.Random(1)
    (tmp_path / "input").mkdir()
    for number in range(shards * 16):
        (tmp_path / f"input/{number:04d}.jpg").write_bytes(encode_image(rng, LABELS[number % 64]))
    config = demo_config(tmp_path, **{"rows_per_shard": 16})
    progress = RecordedProgress()
    run_job(config, progress)
    assert verify(config).ok
    commits = [number for number, update in enumerate(progress.updates) if "shards" in update]
    assert len(commits) == shards
    rows_before_first = sum((update.get("rows") or 0) for update in progress.updates[: commits[0]])
    # Two shards are read at the same time, and the driver notices a commit when the next receipt comes.
    assert rows_before_first <= 5 * 16


def test_a_shard_is_written_while_it_is_read_on_a_full_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The actor and the reader use all cores. Once, the sink had no core until the whole shard was read.

    The driver also received each receipt one block late.
    """
    monkeypatch.setattr("pipelines.cluster.BLOCK_ROWS", 200)
    photo = io.BytesIO()
    Image.effect_noise((1024, 768), 20).convert("RGB").save(photo, "JPEG")  # a block takes a second
    (tmp_path / "input").mkdir()
    (tmp_path / "input/0.tar").write_bytes(make_tar((f"{number}.jpg", photo.getvalue()) for number in range(1500)))
    config = demo_config(tmp_path, **{"rows_per_shard": 1500, "actors.num_cpus": 15, "thumbnails": None})
    reading: list[bool] = []

    class Watch(RecordedProgress):
        def update(self, **done: float | None) -> None:
            reading.append(bool(find_workers("ray::MapBatches(read_shard)")))

    outcome = run_job(config, Watch())
    assert outcome.manifest["rows_tagged"] == 1500
    assert reading[0]


@pytest.mark.slow
def test_the_time_to_stop_ray_is_not_part_of_a_runs_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopping Ray takes seconds in which no image is processed. The images per second must not include them."""
    stopping = 3.0

    @contextmanager
    def slow(*arguments: Any) -> Iterator[Cluster]:
        with connect(*arguments) as cluster:
            yield cluster
        time.sleep(stopping)

    monkeypatch.setattr("pipelines.startup.connect", slow)
    (tmp_path / "input").mkdir()
    (tmp_path / "input/0.jpg").write_bytes(encode_image(random.Random(1), LABELS[0]))
    start = time.monotonic()
    report = run(demo_config(tmp_path)).manifest["run"]
    assert report["startup_seconds"] + report["seconds"] <= time.monotonic() - start - stopping


@pytest.mark.alone
def test_the_pool_grows_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # This model needs an eighth of the base model's time: slow enough to limit the job while two more actors start.
    vision = {"image_size": 256, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
    text = {**ARCHITECTURES["tiny"]["text"], "projection_size": 384}
    monkeypatch.setitem(ARCHITECTURES, "small", {"vision": {**vision, "intermediate_size": 1536}, "text": text})
    init_checkpoint(tmp_path / "small", "small")
    rng = random.Random(1)
    (tmp_path / "input").mkdir()
    for number in range(400):
        (tmp_path / f"input/{number}.jpg").write_bytes(encode_image(rng, LABELS[number % 64]))
    config = demo_config(
        tmp_path,
        **{
            "model": {"source": str(tmp_path / "small"), "compile": False, "dtype": "float32"},
            "actors.max": 3,
            "rows_per_shard": 4,
        },
    )
    outcome = run(config)
    assert verify(config).ok
    assert 2 <= len(outcome.manifest["run"]["actors"]) <= 3


def test_decoders_start_while_the_model_is_loaded(tmp_path: Path, demo: tuple[JobConfig, Outcome]) -> None:
    """Otherwise a ready actor waits for the decoders, which costs a short job seconds."""

    def list_decoders() -> set[int]:
        return {process.pid for process in find_decoders(psutil.Process().children(recursive=True))}

    class Watch(RecordedProgress):
        def start(self, shards: int, rows: int) -> None:
            """The job calls this before it reads."""
            deadline = time.monotonic() + 300
            while not list_decoders() - before:
                assert time.monotonic() < deadline, "no decoder"
                time.sleep(0.1)

    before = list_decoders()
    # Thumbnails of another size: this job cannot reuse the decoders of earlier jobs.
    config = demo_config(tmp_path, **{"input": demo[0].input, "thumbnails": 41})
    run_job(config, Watch())
    assert len(list_decoders() - before) <= SHARE["ray.readers"], "this job starts one decoder for each reader"
    assert verify(config).ok


def test_an_actor_that_fits_on_no_node_is_an_error(
    tmp_path: Path, demo: tuple[JobConfig, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.startup.ACTOR_START_SECONDS", 2)
    config = demo_config(tmp_path, **{"input": demo[0].input, "actors.num_cpus": 4096})
    with pytest.raises(ConfigError, match="no node had room for one of 4096 CPUs, 0 GPUs"):
        run_job(config, RecordedProgress())
    assert not Path(config.output).exists()


def test_a_run_that_cannot_begin_does_not_claim_a_new_output(tmp_path: Path) -> None:
    """The labels may be corrected together with what made the run impossible."""
    place = Place(str(tmp_path), tmp_path)
    place.put("a.png", make_image())
    checkpoint = tmp_path / "damaged"
    init_checkpoint(checkpoint, "tiny", seed=1)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for model in ({"device": "cuda"}, {"source": str(checkpoint)}):
        done = place.tag(model=model, labels=["cta"])
        assert done.returncode == 2, done.stdout + done.stderr
        assert not Path(place.output).exists(), done.stderr
    done = place.tag(labels=["cat"])
    assert done.returncode == 0, done.stderr
    assert place.verify().ok


def test_embedding_labels_may_take_longer_than_the_search_for_a_node(
    tmp_path: Path, demo: tuple[JobConfig, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten thousand labels on two cores take over an hour, which does not mean that no node has enough CPUs."""

    class ImmediateTask:
        """A Ray task that is done at once."""

        def options(self, **resources: Any) -> ImmediateTask:
            return self

        def remote(self, *arguments: Any) -> ray.ObjectRef[None]:
            return ray.put(None)

    monkeypatch.setattr("pipelines.startup.ACTOR_START_SECONDS", 0.05)
    monkeypatch.setattr("pipelines.startup._check_machine", ImmediateTask())
    config = demo_config(tmp_path, **{"input": demo[0].input})
    run_job(config, RecordedProgress())
    assert verify(config).ok


@pytest.mark.s3
def test_a_job_with_input_output_and_model_on_s3(
    s3_env: Radosgw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "cache"))
    bucket, options = f"s3://{s3_env.new_bucket()}", StoreOptions.from_environment()
    store = open_store(bucket, options)
    for path in TINY.iterdir():
        store.put(f"{bucket}/models/tiny/{path.name}", path.read_bytes())
    image = encode_image(random.Random(3), LABELS[7])
    store.put(f"{bucket}/images/album #1/a 100%.jpg", image)
    monkeypatch.delenv("AWS_ENDPOINT_URL")  # the configuration has the endpoint
    keys = {"model.source": f"{bucket}/models/tiny", "s3.endpoint": s3_env.endpoint}
    # A process of its own: the Ray of the other tests has no credentials.
    command = [sys.executable, "-m", "sightline", "tag", str(CONFIG), "--input", f"{bucket}/images"]
    command += ["--output", f"{bucket}/out", *(word for key in keys for word in ("--set", f"{key}={keys[key]}"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert verify_output(Output(f"{bucket}/out", options)).ok
    [data] = store.list(f"{bucket}/out/data")
    [row] = pq.read_table(io.BytesIO(store.read(data.uri))).to_pylist()
    assert (row["key"], row["source"]) == ("album #1/a 100%.jpg", f"{bucket}/images/album #1/a 100%.jpg")
    assert row["labels"][0] == LABELS[7]
    assert row["sha256"] == hashlib.sha256(image).hexdigest()
    # Retag from S3 to S3, with a new label, which the model on S3 must embed.
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_env.endpoint)
    (tmp_path / "labels.yaml").write_text(f"names: [{LABELS[7]}, a new thing]\ntemplates: ['a photo of a {{label}}']\n")
    command = [sys.executable, "-m", "sightline", "retag", f"{bucket}/out", "--output", f"{bucket}/retagged"]
    command += ["--labels", str(tmp_path / "labels.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert verify_output(Output(f"{bucket}/retagged", options)).ok
    [batch] = open_output(f"{bucket}/retagged").batches(["id", "labels", "scores", "thumbnail"])
    [again] = batch.to_pylist()
    assert again["id"] == "000000-000000/0"
    assert again["labels"] == [LABELS[7], "a new thing"]
    assert again["scores"][0] == row["scores"][0]
    assert again["thumbnail"] == row["thumbnail"]
