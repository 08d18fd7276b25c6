"""What the batch job uses of Ray beyond its documented interface, each item with its reason. No other file of
`pipelines` relies on such behaviour.

`test_ray_internals.py` and `test_worker_path.py` in `tests/quick/pipelines/` fail with the item that an installed Ray
no longer has.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import ray._private.worker
from ray.job_config import JobConfig

TESTED_RAY = "2.60.0"
"""The version of Ray that these items were tested with, as in constraints.txt."""

READER_ENVIRONMENT = {"env_vars": {"SIGHTLINE_STAGE": "read"}}
"""The runtime environment of reader tasks. Nothing reads the variable.

Ray runs a task in any idle worker with the task's runtime environment. With an environment of their own, readers run in
workers that have read before, so that there are no more workers with decoder processes than shards read at once. When
all workers had the same environment, 300 shards left seven decoders of 240 MiB each, of which two were working.
"""

CORE_LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"
"""The environment variable with the log level of Ray's core, which `ray.init` reads once."""

IGNORE_UNHANDLED = "RAY_IGNORE_UNHANDLED_ERRORS"
"""The environment variable without which Ray prints the traceback of a failed task whose result nobody fetches. When a
disk is full, several commits fail, and the run ends with the first."""

DATA_LOGGER = "ray.data"
"""Ray Data's logger. Before it raises the exception that ends a run, it logs the exception with its stack."""

IGNORED_WARNINGS: dict[str, type[Warning]] = {
    # The number of retries of a task or actor can only be set through `ray_remote_args`.
    "ray_remote_args": DeprecationWarning,
    # The pool may have more actors than there are shards at first: a shard becomes many blocks.
    "minimum number of concurrent actors": UserWarning,
}
"""Warnings of Ray Data that do not apply to the batch job: a part of the text, and the category."""

DATA_SETTINGS = (
    "target_max_block_size",
    "enable_progress_bars",
    "max_errored_blocks",
    "wait_for_min_actors_s",
    "max_consecutive_actor_init_deaths",
)
"""The attributes of `ray.data.DataContext` that the batch job sets."""


ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds Sightline's packages: `site-packages`, or the repository of an editable installation."""


@cache
def warn_untested_ray() -> None:
    """Print one line on the standard error if the installed Ray is newer than `TESTED_RAY`. Later calls do nothing."""
    message = describe_untested_ray(version("ray"))
    if message:
        print(message, file=sys.stderr)


def describe_untested_ray(installed: str) -> str | None:
    """Return a warning in one line if `installed`, a version of Ray, is newer than `TESTED_RAY`, else None."""
    if _parse_version(installed) <= _parse_version(TESTED_RAY):
        return None
    return (
        f"warning: Ray {installed} is installed, and Sightline was tested with Ray {TESTED_RAY}: "
        f"if a job fails inside Ray, install ray=={TESTED_RAY}"
    )


def _parse_version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def count_retries() -> int:
    """Return how often Ray has repeated this task, because its process died. 0 outside of a task.

    Ray's runtime context does not have the number; its core worker has.
    """
    if not ray.is_initialized():
        return 0
    return int(ray._private.worker.global_worker.core_worker.get_current_task_attempt_number())


@contextmanager
def keep_signals() -> Iterator[None]:
    """Keep signals in the caller's hands while `ray.init` runs, and keep SIGHUP from the processes that it starts.

    Ray installs a handler for SIGTERM, which would end the process with exit code 15 and a stack trace. Ray's core also
    installs a handler below Python's; setting Python's again replaces that one too. Outside the main thread Ray leaves
    signals alone.

    A terminal that is closed sends SIGHUP to Ray's processes too. They would end before this one has shut them down,
    and Ray's core in this process then ends it at once, with exit code 1 and without a word. They inherit that SIGHUP
    is blocked; one that arrives meanwhile is delivered afterwards. Ray does the same with SIGINT.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    try:
        yield
    except SystemExit as error:
        if error.code == signal.SIGTERM and callable(handler):  # SIGTERM came while Ray was starting
            handler(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextmanager
def quiet_core() -> Iterator[None]:
    """Silence Ray's core while `ray.init` runs, and for the length of the process.

    Ray Data keeps its actors' arguments in the object store, and Ray's core logs an error about each of them. The log
    level that prevents it is announced on the standard error, which is therefore closed meanwhile.
    """
    os.environ.setdefault(CORE_LOG_LEVEL, "fatal")
    os.environ.setdefault(IGNORE_UNHANDLED, "1")
    with silence_stderr():
        yield


@contextmanager
def silence_stderr() -> Iterator[None]:
    """Discard what this process, and processes that it starts meanwhile, write to the standard error.

    Ray's core writes there below Python, so `contextlib.redirect_stderr` does not reach it.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def quiet_data() -> None:
    """Silence Ray Data's logger and its warnings that do not apply, for the length of the process.

    The exception that ends a run is raised all the same, and the command shows it in one line.
    """
    logging.getLogger(DATA_LOGGER).setLevel(logging.CRITICAL)
    for text, category in IGNORED_WARNINGS.items():
        warnings.filterwarnings("ignore", f".*{text}.*", category=category)


@contextmanager
def data_settings(settings: dict[str, Any]) -> Iterator[None]:
    """Set attributes of Ray Data's context, all among `DATA_SETTINGS`, and restore them afterwards.

    The context belongs to the whole process, which may use Ray Data for something else.
    """
    from ray.data import DataContext

    context = DataContext.get_current()
    before = {name: getattr(context, name) for name in settings}
    for name, value in settings.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


@contextmanager
def keep_actors() -> Iterator[None]:
    """Let the actors of one dataset go on in the next, for the length of a `with` block.

    Ray Data starts a pool of actors for each dataset, and drops them at its end. To load the model takes seconds, and
    minutes if it is compiled. So the handles are kept when a dataset ends, and given to the next dataset that starts a
    pool with the same stage, in place of new actors. Actors that Ray Data drops because it scales a pool down are not
    kept. At the end of the block all of them end.

    Until then their arguments are held too, which are in Ray's object store: Ray needs them to restart an actor whose
    process died, and they would be deleted with the dataset that started it.

    Two internals of `ActorPoolMapOperator` are replaced meanwhile: the attribute `_actor_cls`, from which it starts
    actors, and `_do_shutdown`. So is `_ActorPool._can_apply_request`: Ray Data forces a pool to drop its actors when
    all its input is processed, a little before the dataset ends, and it forces nothing else.
    """
    from ray.data._internal.execution.operators import actor_pool_map_operator

    Pool, Actors = actor_pool_map_operator.ActorPoolMapOperator, actor_pool_map_operator._ActorPool  # noqa: N806
    kept: dict[str, list[Any]] = {}
    held: list[Any] = []
    shut_down, can_apply = Pool._do_shutdown, Actors._can_apply_request

    def shut_down_and_keep(pool: Any, force: bool = False) -> None:
        if not force:
            kept.setdefault(pool.name, []).extend(pool._actor_pool._running_actors)
        shut_down(pool, force)

    def get_class(pool: Any) -> Any:
        made = pool.__dict__.get("_actor_cls")
        return made and _KeptActors(kept.setdefault(pool.name, []), held, made)

    def set_class(pool: Any, made: Any) -> None:
        pool.__dict__["_actor_cls"] = made

    def can_apply_and_keep(actors: Any, request: Any) -> bool:
        return not (request.delta < 0 and request.force) and bool(can_apply(actors, request))

    Pool._do_shutdown, Pool._actor_cls = shut_down_and_keep, property(get_class, set_class)
    Actors._can_apply_request = can_apply_and_keep
    try:
        yield
    finally:
        Pool._do_shutdown, Actors._can_apply_request = shut_down, can_apply
        del Pool._actor_cls
        kept.clear()
        held.clear()


class _KeptActors:
    """Has the interface of an actor class, and returns a kept actor instead of a new one while there is one.

    Adds the arguments of a new one to `held`.
    """

    def __init__(self, kept: list[Any], held: list[Any], made: Any) -> None:
        self._kept, self._held, self._made = kept, held, made

    def options(self, **options: Any) -> _KeptActors:
        return _KeptActors(self._kept, self._held, self._made.options(**options))

    def remote(self, *arguments: Any, **named: Any) -> Any:
        if self._kept:
            return self._kept.pop()
        self._held.append((arguments, named))
        return self._made.remote(*arguments, **named)


def own_code_first() -> JobConfig:
    """Return the `job_config` for `ray.init` with which workers import Sightline's packages, and none of the user's.

    A driver tells Ray which folders its workers put first on `sys.path`. `ray.init` adds the folder of the driver's
    script and the working directory to them, so that a user's `storage.py` in the working directory would be imported
    by a worker instead of Sightline's package of that name. `_py_driver_sys_path` is a private name of Ray.

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
