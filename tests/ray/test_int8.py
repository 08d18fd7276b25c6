"""A job in int8: measured on its own first images before any image is tagged, and never mixed with other dtypes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import JobConfig, load_config
from pipelines.job import run_job
from pipelines.output.output import Output
from sightline.demo.dataset import CONFIG, render_dataset
from sightline.demo.shapes import LABELS, render
from siglip.scoring import format_cosine
from siglip.torch_internals import has_vnni
from storage.settings import ConfigError
from tests.conftest import require
from tests.support.jobs import SHARE, RecordedProgress
from tests.support.outliers import write_outliers

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(autouse=True)
def _vnni() -> None:
    require("AVX-512 VNNI", None if has_vnni() else "a CPU with AVX-512 VNNI is needed")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "input"
    render_dataset(folder)
    return folder


def configure(images: Path, output: Path, **model: Any) -> JobConfig:
    model = {"source": "tiny", "dtype": "int8", **model}
    return load_config(CONFIG, {"input": str(images), "output": str(output), "model": model, **SHARE})


def test_a_run_says_and_keeps_what_int8_costs_on_its_first_images(images: Path, tmp_path: Path) -> None:
    config, progress = configure(images, tmp_path / "output"), RecordedProgress()
    manifest = run_job(config, progress).manifest
    found = manifest["run"]["fidelity"]
    assert (found["dtype"], found["images"]) == ("int8", 32)
    assert 0.998 <= found["min_cosine"] <= found["mean_cosine"] < 1
    assert found["relabelled"] <= 3
    assert manifest["rows_tagged"] == 607
    assert any(f"cosine {format_cosine(found['min_cosine'])} at least" in message for message in progress.messages)
    assert manifest["fingerprint"]["model.dtype"] == "int8"
    with pytest.raises(ConfigError, match=r'model.dtype: "int8" there, null now'):
        run_job(configure(images, tmp_path / "output", dtype="auto"), RecordedProgress())


def test_images_below_the_bound_end_the_run_before_any_is_tagged(images: Path, tmp_path: Path) -> None:
    """An outlier channel that the self-test's synthetic images hardly show: their lowest cosine is 0.9927."""
    source = write_outliers(tmp_path / "checkpoint", factor=100, channels=1, seed=2)
    config = configure(images, tmp_path / "output", source=str(source))
    with pytest.raises(
        ConfigError, match=r"model.dtype: int8 .* 0.99: use model.dtype: auto with a new output, or delete"
    ) as refused:
        run_job(config, RecordedProgress())
    assert "\n" not in str(refused.value)
    output = Output(config.output)
    assert not [*output.store.names(output.uri_of("data"))]


def test_images_that_cannot_be_decoded_are_not_compared(tmp_path: Path) -> None:
    folder = tmp_path / "input"
    folder.mkdir()
    (folder / "broken.jpg").write_bytes(b"no image")
    progress = RecordedProgress()
    manifest = run_job(configure(folder, tmp_path / "output", min_cosine=0.5), progress).manifest
    assert manifest["run"]["fidelity"] is None
    assert any("int8 was not compared with bfloat16" in message for message in progress.messages)


def test_the_bound_is_applied_though_the_first_shards_have_no_image(tmp_path: Path) -> None:
    folder = tmp_path / "input"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02}.jpg").write_bytes(b"no image")
    for number in range(3):
        render(LABELS[number], random.Random(number)).save(folder / f"later{number}.png")
    progress = RecordedProgress()
    config = configure(folder, tmp_path / "output").model_copy(update={"rows_per_shard": 1})
    manifest = run_job(config, progress).manifest
    assert manifest["run"]["fidelity"]["images"] == 1
    assert any("no image in the first 16 shards" in message for message in progress.messages)
    assert any("int8 is not faster in this run" in message for message in progress.messages)
    strict = configure(folder, tmp_path / "other", min_cosine=0.9999)
    strict = strict.model_copy(update={"rows_per_shard": 1})
    with pytest.raises(ConfigError, match=r"model.min_cosine"):
        run_job(strict, RecordedProgress())
