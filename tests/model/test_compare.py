"""`sightline model compare`: two models on the same images, and what is not compared is said."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from sightline.cli import app
from sightline.demo.shapes import LABELS, render
from siglip.checkpoint import pin_model
from siglip.checkpoints.architectures import init_checkpoint
from siglip.checkpoints.comparison import ComparedModel, decode_files
from siglip.checkpoints.files import CheckpointError
from siglip.config import ImageSpec, Limits, ModelConfig
from siglip.encoder import Encoder
from siglip.images.decode import Decoded
from siglip.torch_internals import has_vnni
from tests.conftest import require
from tests.support.checkpoints import make_naflex
from tests.support.outliers import write_outliers

COUNT = 60


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sixty images in two folders, two that are broken, and a file that is no image."""
    folder = tmp_path_factory.mktemp("images") / "input"
    rng = random.Random(5)
    for number in range(COUNT):
        path = folder / str(number % 2) / f"{number}.{'png' if number % 3 else 'JPG'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        render(LABELS[number % len(LABELS)], rng, (80, 64)).save(path)
    (folder / "broken.jpg").write_bytes((folder / "0" / "0.JPG").read_bytes()[:500])
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labels") / "labels.txt"
    path.write_text("\n".join(LABELS))
    return path


def compare(first: str | Path, second: str | Path, images: Path, *more: str | Path) -> Result:
    arguments = ["model", "compare", str(first), str(second), "--images", str(images), *map(str, more)]
    return CliRunner().invoke(app, arguments)


def read(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_two_dtypes_of_a_checkpoint(images: Path, labels: Path) -> None:
    result = compare("tiny@float32", "tiny@bfloat16", images, "--labels", labels, "--json")
    found = read(result)
    assert (found["images"], found["skipped"]) == (COUNT, 1)
    assert {(Path(one["image"]).name, one["reason"]) for one in found["rejected"]} == {
        ("broken.jpg", "truncated"),
        ("empty.png", "empty"),
    }
    for name in ("broken.jpg: truncated", "empty.png: empty"):
        assert name in result.stderr
    paths = [path for path in sorted(images.rglob("*")) if path.is_file() and path.suffix != ".txt"]
    spec = ImageSpec(size=64)
    pixels = np.stack([image.pixels for image in decode_files(paths, spec) if isinstance(image, Decoded)])
    one, other = (Encoder(pin_model(ModelConfig(dtype=dtype, compile=False))) for dtype in ("float32", "bfloat16"))
    cosines = (one.embed_images(pixels) * other.embed_images(pixels)).sum(axis=1)
    assert found["cosines"]["min"] == pytest.approx(cosines.min(), abs=1e-5)
    assert found["cosines"]["p50"] == pytest.approx(np.median(cosines), abs=1e-5)
    assert found["cosines"]["mean"] == pytest.approx(cosines.mean(), abs=1e-5)
    assert found["labels"]["best_label_agrees"] >= COUNT - 1
    assert 0 < found["labels"]["mean_score_difference"] < found["labels"]["largest_score_difference"] < 0.2
    assert [model["dtype"] for model in found["models"]] == ["float32", "bfloat16"]
    assert all(model["images_per_second"] > 0 for model in found["models"])


def test_a_model_beside_itself_differs_in_nothing(images: Path, labels: Path) -> None:
    found = read(compare("tiny@float32", "tiny@float32", images, "--labels", labels, "--json"))
    assert found["cosines"]["min"] == pytest.approx(1, abs=1e-6)
    assert found["labels"] == {
        "best_label_agrees": COUNT,
        "relabelled": 0,
        "largest_score_difference": 0,
        "mean_score_difference": 0,
    }


def test_embeddings_of_two_checkpoints_are_not_compared(images: Path, labels: Path, tmp_path: Path) -> None:
    """They have the same width, so that cosines could be computed."""
    init_checkpoint(tmp_path / "other", "tiny", seed=3)
    found = read(compare("tiny", tmp_path / "other", images, "--labels", labels, "--json"))
    assert found["cosines"] is None
    assert found["labels"]["best_label_agrees"] < COUNT / 2
    assert len({model["checkpoint"] for model in found["models"]}) == 2
    printed = compare("tiny", tmp_path / "other", images)
    assert "none: these are two checkpoints" in printed.stdout
    assert "not compared: give --labels" in printed.stdout


def test_models_that_see_an_image_in_another_form(images: Path, tmp_path: Path) -> None:
    found = read(compare("tiny", make_naflex(tmp_path / "naflex"), images, "--json"))
    assert (found["images"], len(found["rejected"]), found["cosines"]) == (COUNT, 2, None)


def test_the_figures_in_words(images: Path, labels: Path) -> None:
    printed = compare("tiny@float32", "tiny@bfloat16", images, "--labels", labels)
    assert printed.exit_code == 0
    for words in (
        f"{COUNT} compared, 2 cannot be decoded, 1 other files",
        "at least",
        f"of {COUNT} images",
        "bfloat16, not compiled",
    ):
        assert words in printed.stdout


def test_a_model_below_the_bound_is_still_compared(images: Path, tmp_path: Path) -> None:
    require("AVX-512 VNNI", None if has_vnni() else "a CPU with AVX-512 VNNI is needed")
    source = write_outliers(tmp_path / "outliers", factor=100)
    result = compare(f"{source}@bfloat16", f"{source}@int8", images, "--json")
    assert read(result)["cosines"]["min"] < 0.9
    assert "int8 is faster than bfloat16 only if it is compiled" in compare("tiny", "tiny@int8", images).stdout


def test_models_with_the_names_of_other_lines(images: Path, labels: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Each has a line of its own, also when both are the same model."""
    monkeypatch.chdir(tmp_path)
    init_checkpoint(Path("labels"), "tiny")
    printed = compare("labels", "labels", images, "--labels", labels).stdout
    assert sum("images/s, " in line for line in printed.splitlines()) == 2
    assert f"the best one agrees for {COUNT} of {COUNT} images" in printed


def test_images_are_those_that_a_job_reads_and_all_others_are_counted(images: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "input", images / "0" / "0.JPG"
    (folder / ".thumbnails").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for path in (folder / "a\nb.jpg", folder / ".thumbnails" / "a.jpg", tmp_path / "elsewhere" / "c.jpg"):
        path.write_bytes(file.read_bytes())
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(folder)
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "line\nfeed.png").write_bytes(b"no image")
    with (folder / "large.png").open("wb") as large:
        large.truncate(Limits().max_bytes + 1)
    result = compare("tiny", "tiny", folder, "--json")
    found = read(result)
    assert found["images"] == 2
    assert {one["image"].rpartition("/")[2]: one["reason"] for one in found["rejected"]} == {
        "large.png": "too_many_bytes",
        "line\\nfeed.png": "not_an_image",
    }
    assert "line\\nfeed.png: not_an_image" in result.stderr
    assert found["skipped"] == 3
    assert found["skipped_kinds"] == {
        "hidden files": 1,
        "broken links and special files": 1,
        "links in a circle or to a folder that is read anyway": 1,
    }
    printed = compare("tiny", "tiny", folder).stdout
    assert "skipped 3: " in printed
    assert "says little: these are fewer images than a batch" in printed


def test_embeddings_that_are_no_unit_vectors_end_in_one_line(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ComparedModel, pixels: np.ndarray) -> np.ndarray:
        raise CheckpointError("model.source: the model's embeddings of images are not finite or 0: broken weights")

    monkeypatch.setattr(ComparedModel, "embed", refuse)
    result = compare("tiny", "tiny", images)
    assert result.exit_code == 2
    assert "broken weights" in result.stderr


def test_a_folder_with_an_at_sign_in_its_name(images: Path, tmp_path: Path) -> None:
    init_checkpoint(tmp_path / "mine@int8", "tiny")
    found = read(compare(tmp_path / "mine@int8", f"{tmp_path / 'mine@int8'}@float32", images, "--json"))
    assert found["models"][1]["dtype"] == "float32"
    assert found["cosines"]["min"] > 0.999


@pytest.mark.parametrize(
    ("second", "folder", "more", "says"),
    [
        ("tiny@int4", "", (), "tiny@int4: 'int4' is not a dtype: use SOURCE@DTYPE with auto, float32, bfloat16, int8"),
        ("nowhere", "", (), "nowhere"),
        ("tiny", "no", (), "is not a folder"),
        ("tiny", "texts", (), "has no image"),
        ("tiny", "bad", (), "none of the 1 images in"),
        ("tiny", "", ("--labels", "nowhere.txt"), "nowhere.txt"),
        ("tiny", "n" * 300, (), "--images:"),
        ("n" * 300, "", (), "File name too long"),
    ],
)
def test_bad_usage_ends_in_one_line(
    images: Path, tmp_path: Path, second: str, folder: str, more: tuple[str, ...], says: str
) -> None:
    for name, file in (("texts", "a.txt"), ("bad", "a.png")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("no image")
    result = compare("tiny", second, tmp_path / folder if folder else images, *more)
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
