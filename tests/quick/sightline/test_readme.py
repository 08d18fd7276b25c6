"""The documentation names real commands, options, targets, keys and files."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pipelines.config import JobConfig
from sightline.cli import app

ROOT = Path(__file__).parents[3]
PAGES = [path for name in ("*.md", "docs/*.md", "k8s/*.md", "curation/*.md") for path in sorted(ROOT.glob(name))]


def code_lines(page: Path) -> Iterator[str]:
    """The lines of indented and fenced code blocks."""
    fenced = False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def named(program: str) -> list[tuple[str, str]]:
    """(page, line) for each line of code that runs a program."""
    return [
        (page.relative_to(ROOT).as_posix(), line)
        for page in PAGES
        for line in code_lines(page)
        if line.startswith(program + " ")
    ]


@pytest.mark.parametrize(("page", "line"), named("sightline"))
def test_commands_and_options_exist(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    words = words[: next((n for n, word in enumerate(words) if word in ("|", ">", ">>", "&")), len(words))]
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        found = command.commands.get(words.pop(0))
        assert found is not None, line
        command = found
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    for word in words:
        if word.startswith("-"):
            assert word.partition("=")[0] in known, word
        elif word.startswith(("configs/", "k8s/")):
            assert (ROOT / word).exists(), word


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = named("make")
    assert lines
    for page, line in lines:
        assert line.split()[1] in targets, (page, line)


def test_benchmarks_exist() -> None:
    for page, line in named("python"):
        words = line.split()
        if words[1] == "-m":
            assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file(), (page, line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"`((?:[a-z0-9_]+/)+[a-z0-9_.-]*)`", text):
        if name.split("/")[0] in {path.name for path in ROOT.iterdir()} and not name.startswith("output/"):
            assert (ROOT / name).exists() or (page.parent / name).exists(), name


def test_the_example_job_is_valid() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        assert JobConfig.model_validate(yaml.safe_load(block)).labels.names


def test_the_architecture_page_has_every_module() -> None:
    """Mended by `python scripts/write_map.py`."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert runpy.run_path(str(ROOT / "scripts" / "write_map.py"))["replace_map"](page) == page


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
