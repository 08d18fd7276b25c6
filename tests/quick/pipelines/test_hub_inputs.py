"""What planning, commands and exports make of a dataset on the hub, on a stand-in for it."""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from curation.export.export import export_output
from curation.retag import retag_output
from curation.review.labelstudio import _image
from pipelines.config import JobConfig
from pipelines.inputs.rows import Skipped
from pipelines.output.output import Output
from sightline import open_output
from siglip.checkpoint import pin_model
from siglip.checkpoints.files import CheckpointError
from siglip.config import ModelConfig
from storage.settings import ConfigError
from tests.support.exports import KEYS, ROWS, draw, make_output
from tests.support.images import encode, make_rgb
from tests.support.input_folder import OPTIONS, extend_plan, read_planned
from tests.support.jobs import RecordedProgress, make_parquet, run_sightline
from tests.support.stores.hub_server import HubServer

IMAGE = encode(make_rgb())
_count = itertools.count()


@pytest.fixture
def repo(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a new dataset, which has no file yet."""
    monkeypatch.setattr("storage.retry.PAUSE_SECONDS", 0.001)
    hub.use(monkeypatch)
    return f"owner/inputs-{next(_count)}"


@pytest.mark.parametrize("revision", ["~parquet", "refs/convert/parquet", "refs%2Fconvert%2Fparquet"])
def test_a_split_that_is_converted_in_part_is_named(hub: HubServer, repo: str, tmp_path: Path, revision: str) -> None:
    """The hub converts the first gigabytes of a large dataset. Its other images must not be missing without a word."""
    file = make_parquet({"image": [IMAGE, IMAGE]}, row_group_size=1)
    files = {f"default/partial-train/{number:04}.parquet": file for number in range(3)}
    hub.commit(repo, {**files, "default/test/0000.parquet": file}, "refs/convert/parquet")
    root = f"hf://datasets/{repo}@~parquet"
    config = JobConfig(
        input=(f"hf://datasets/{repo}@{revision}",), output=str(tmp_path), labels=["a"], rows_per_shard=1
    )
    report, _ = extend_plan(config, OPTIONS)
    (note,) = report.notes
    assert note.startswith(
        f"3 files, such as {root}/default/partial-train/0000.parquet, are of splits of which the hub"
    )
    assert extend_plan(config, OPTIONS)[0].notes == []


def test_a_revision_is_one_input_however_it_is_written(hub: HubServer, repo: str, tmp_path: Path) -> None:
    """Else each image would be tagged once for each spelling, without a word."""
    files = {"a.png": IMAGE, "l.csv": b"path\na.png\n"}
    hub.commit(repo, files)
    hub.commit(repo, files, "refs/convert/parquet")
    root = f"hf://datasets/{repo}"
    others = (f"{root}@refs/convert/parquet", f"{root}@refs%2Fconvert%2Fparquet", f"{root}@~parquet/a.png")
    config = JobConfig(input=(root, f"{root}@main", f"{root}@main/a.png", *others), output=str(tmp_path), labels=["a"])
    _, columns = extend_plan(config, OPTIONS)
    rows = [row.source for row in read_planned(config, OPTIONS, columns, Skipped())]
    assert sorted(rows) == [f"{root}/a.png", f"{root}@~parquet/a.png"]
    lists = JobConfig(input=(f"{root}@main/l.csv", f"{root}@mainly/x"), output=str(tmp_path), labels=["a"])
    assert lists.input == (f"{root}/l.csv", f"{root}@mainly/x")
    extend_plan(lists.model_copy(update={"input": lists.input[:1]}), OPTIONS)
    assert len(read_planned(config, OPTIONS, columns, Skipped())) == 2


def test_a_whole_split_has_no_note(hub: HubServer, repo: str, tmp_path: Path) -> None:
    hub.commit(repo, {"default/train/0000.parquet": make_parquet({"image": [IMAGE]})}, "refs/convert/parquet")
    hub.commit(repo, {"x/partial-train/0000.parquet": make_parquet({"image": [IMAGE]})})
    roots = (f"hf://datasets/{repo}@~parquet", f"hf://datasets/{repo}")
    config = JobConfig(input=roots, output=str(tmp_path), labels=["a"])
    report, columns = extend_plan(config, OPTIONS)
    assert report.notes == []
    rows = read_planned(config, OPTIONS, columns, Skipped())
    assert sorted(row.source.removeprefix(f"hf://datasets/{repo}") for row in rows) == [
        "/x/partial-train/0000.parquet",
        "@~parquet/default/train/0000.parquet",
    ]


@pytest.mark.parametrize(
    "open_",
    [
        lambda uri: Output(uri),
        open_output,
        lambda uri: JobConfig(input="/in", output=uri, labels=["a"]),
        lambda uri: JobConfig(input="/in", output=uri.replace("hf:", "HF:"), labels=["a"]),
    ],
)
def test_an_output_on_the_hub_is_refused(open_: Callable[[str], object]) -> None:
    with pytest.raises(
        (ConfigError, ValueError), match=r"hf:// is for inputs only: give a folder, or a prefix in s3://"
    ):
        open_("hf://datasets/owner/name/tags")


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", "hf://datasets/owner/name", "--text", "a cat"),
        ("status", "hf://datasets/owner/name"),
        ("verify", "hf://datasets/owner/name"),
        ("publish", "hf://datasets/owner/name"),
        ("export", "hf://datasets/owner/name", "/tmp/none", "--to", "imagefolder"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_refuse_an_output_on_the_hub(arguments: tuple[str, ...]) -> None:
    done = run_sightline(*arguments)
    said = " ".join(done.stderr.split())
    assert (done.returncode, "hf:// is for inputs only" in said) == (2, True), said


def test_retag_refuses_an_output_on_the_hub(tmp_path: Path) -> None:
    output = make_output(str(tmp_path / "out"), sources=["/none"] * ROWS, thumbnails=False)
    labels = JobConfig(input="/in", output="/out", labels=["a"]).labels
    with pytest.raises(ConfigError, match="for inputs only"):
        retag_output(output, labels, "hf://datasets/owner/name/tags", RecordedProgress())


def test_a_checkpoint_is_named_by_its_id() -> None:
    with pytest.raises(CheckpointError, match="write a checkpoint of the hub as its id, OWNER/NAME"):
        pin_model(ModelConfig(source="hf://models/google/siglip-base-patch16-256"))


def test_originals_are_read_again(hub: HubServer, repo: str, tmp_path: Path) -> None:
    """An export has the files that were tagged, from the sources of the rows."""
    files = {f"images/{row} \u00e9#%20.png": draw(row) for row in range(ROWS)}
    hub.commit(repo, files)
    root = f"hf://datasets/{repo}"
    output = make_output(str(tmp_path / "out"), sources=[f"{root}/{name}" for name in files], thumbnails=False)
    done = export_output(output, "webdataset", tmp_path / "tars")
    assert done.images == ROWS
    with tarfile.open(tmp_path / "tars/shard-000000.tar") as tar:
        for row in range(len(KEYS), ROWS):
            file = tar.extractfile(f"plain_{row:05d}.png")
            assert file is not None
            assert file.read() == draw(row)


def test_label_studio_gets_a_url(hub: HubServer, repo: str) -> None:
    row = {"source": f"hf://datasets/{repo}@feature%2Fx/a b#.jpg", "thumbnail": None, "key": "a b#.jpg"}
    assert _image(row) == f"{hub.endpoint}/datasets/{repo}/resolve/feature%2Fx/a%20b%23.jpg"
