"""An import guard: Sightline's own packages are imported, whatever the working directory holds.

Some of Sightline's packages have common names, such as `storage` and `serve`. Python looks for a module in the folders
of `sys.path`, in order. The script's folder, the working directory (with `python -m` and in notebooks) and the folders
of PYTHONPATH come before the installed packages. A user's own `storage.py` there would be imported instead of
Sightline's package.

`sightline/__init__.py` installs the guard, so it works in each process that imports `sightline` first. Ray's workers
do not do that: see `pipelines.ray_internals`. The guard cannot protect the name `sightline` itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds Sightline's packages: `site-packages`, or the repository of an editable installation."""
PACKAGES = frozenset(["configs", "curation", "pipelines", "serve", "siglip", "storage"])
"""Sightline's top-level packages, except `sightline`."""


class OwnPackageFinder:
    """A finder for `sys.meta_path` that finds the packages in `PACKAGES` below `ROOT`, and nothing else."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return where a package of `PACKAGES` is. Return None for all other names, which other finders then look for.

        `path` is None for a top-level module. Submodules are found through their package's own path.
        """
        return PathFinder.find_spec(name, [str(ROOT)]) if name in PACKAGES else None


def install_finder() -> None:
    """Put the finder first on `sys.meta_path`. A second call changes nothing.

    Raises `ImportError` when another module with the name of one of the packages is already imported: Sightline would
    get that module, and fail later with a message that does not tell why.
    """
    if OwnPackageFinder in sys.meta_path:
        return
    for name in sorted(PACKAGES & sys.modules.keys()):
        spec = sys.modules[name].__spec__
        found = [spec.origin] if spec and spec.origin else list((spec and spec.submodule_search_locations) or [])
        if not any(Path(place).resolve().is_relative_to(ROOT / name) for place in found if place):
            raise ImportError(
                f"sightline has a package named {name!r}, and another module of this name is already imported "
                f"({found[0] if found else 'from nowhere'}): rename that module"
            )
    sys.meta_path.insert(0, OwnPackageFinder)
