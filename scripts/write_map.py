"""Write the map of modules in `docs/architecture.md`: each module with the first sentence of its docstring.

    python scripts/write_map.py

A test (`tests/quick/sightline/test_readme.py`) compares the page with the modules, so run this after adding a module or
changing the first sentence of its docstring.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("sightline", "curation", "pipelines", "serve", "siglip", "storage")
BEGIN, END = "<!-- map -->", "<!-- /map -->"


def read_summary(module: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = " ".join((ast.get_docstring(ast.parse(module.read_text())) or "").split("\n\n")[0].split())
    sentence = re.match(r".*?\.(?= [A-Z`]|$)", text)
    return sentence[0].rstrip(".") if sentence else text


def list_folders(package: str) -> list[Path]:
    """The folders of a package that hold Python modules, the package itself first."""
    return sorted({path.parent for path in (ROOT / package).rglob("*.py") if "__pycache__" not in path.parts})


def make_map() -> str:
    """The map as Markdown: a table for each package, with a line for each module that says something."""
    lines = []
    for package in PACKAGES:
        lines += [f"### `{package}/`", "", f"{read_summary(ROOT / package / '__init__.py')}.", ""]
        lines += ["| module | contents |", "|---|---|"]
        for folder in list_folders(package):
            for module in sorted(folder.glob("*.py")):
                name = module.relative_to(ROOT).as_posix()
                if module.name == "__init__.py":
                    if folder != ROOT / package:
                        lines.append(f"| **`{folder.relative_to(ROOT).as_posix()}/`** | **{read_summary(module)}** |")
                elif module.name != "__main__.py":
                    lines.append(f"| `{name}` | {read_summary(module)} |")
        lines.append("")
    return "\n".join(lines)


def replace_map(page: str) -> str:
    """The page with the present map between its two markers."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{make_map()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(replace_map(PAGE.read_text()))
