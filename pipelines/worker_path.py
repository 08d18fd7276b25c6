"""The module search path of Ray's workers: Sightline's own packages come first.

A driver tells Ray which folders its workers put first on `sys.path`. `ray.init` adds the folder of the driver's script
and the working directory to them, so that a user's `storage.py` in the working directory would be imported by a worker
instead of Sightline's package of that name.

Uses a private name of Ray: `JobConfig(_py_driver_sys_path=...)`. tests/quick/pipelines/test_worker_path.py fails when
it is gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ray.job_config import JobConfig

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds Sightline's packages: `site-packages`, or the repository of an editable installation."""


def own_code_first() -> JobConfig:
    """Return the `job_config` for `ray.init` with which workers import Sightline's packages, and none of the user's.

    A worker puts `ROOT` first on its `sys.path`, before the folders of PYTHONPATH. It costs nothing when a worker
    starts, and works on a joined cluster too: a node without this folder uses its own installation. In a worker
    site-packages thus comes before the standard library, most of which Ray has imported by then.
    """
    return JobConfig(_py_driver_sys_path=_ClosedPath([str(ROOT)]))


class _ClosedPath(list[str]):
    """A list of folders that `ray.init` cannot extend with the script's folder and the working directory."""

    def extend(self, folders: Iterable[str], /) -> None:
        """Ignore the folders."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a plain list: a Ray Client's server reads it before it can import this module."""
        return list, (list(self),)
