"""`docs/export.md`: its commands and its Python run as they stand, on an output in the folder `tagged`."""

from __future__ import annotations

import gc
import json
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sightline.cli import app
from tests.support.exports import ROWS, make_output

PAGE = (Path(__file__).parents[3] / "docs/export.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page")
    make_output(path / "tagged")
    (path / "exported").mkdir()
    return path


@pytest.mark.parametrize("title", SECTIONS)
def test_the_page_runs_as_it_stands(
    title: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    # The environment variable is read when the library is imported, and would hold for the tests after these.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    commands = re.findall(r"^    sightline (.*)$", SECTIONS[title], re.MULTILINE)
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command))
        assert (result.exit_code, f"{ROWS} images are in " in result.stdout) == (0, True), result.output
    [code] = re.findall(r"```python\n(.*?)```", SECTIONS[title], re.DOTALL)
    if "fiftyone" in code:
        return  # needs MongoDB: see tests/clients/test_fiftyone.py
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset does not close tars
        exec(compile(code, f"docs/export.md: {title}", "exec"), names)
        names.clear()
        gc.collect()
    printed = capsys.readouterr().out
    if title.startswith("CSV"):
        rows = [json.loads(line) for line in (folder / "exported/rows.jsonl").read_text().splitlines()]
        assert len(rows) == ROWS
        assert isinstance(rows[0]["labels"], list)
        assert (folder / "exported/rows.csv").stat().st_size > 1000
    else:
        assert len(printed) > 10


def test_every_target_has_its_place_on_the_page() -> None:
    from curation.export.export import TARGETS

    assert {
        re.findall(r"--to (\w+)", command)[0] for command in re.findall(r"^    sightline export tagged.*", PAGE, re.M)
    } == set(TARGETS)
