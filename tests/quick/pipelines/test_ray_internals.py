"""The items of Ray that `pipelines.ray_internals` uses, in the installed Ray."""

from __future__ import annotations

import inspect
import logging
import mmap
import re
from pathlib import Path

import pytest
import ray
import ray._private.worker
import ray.data
from ray.data import DataContext, Dataset
from ray.data._internal.actor_autoscaler import default_actor_autoscaler
from ray.data._internal.actor_autoscaler.autoscaling_actor_pool import ActorPoolScalingRequest
from ray.data._internal.execution.operators import actor_pool_map_operator

from pipelines import ray_internals
from pipelines.ray_internals import (
    CORE_LOG_LEVEL,
    DATA_LOGGER,
    DATA_SETTINGS,
    IGNORE_UNHANDLED,
    IGNORED_WARNINGS,
    TESTED_RAY,
    data_settings,
    describe_untested_ray,
    warn_untested_ray,
)

RAY = Path(ray.__file__).parent
ROOT = Path(__file__).parents[3]


def test_the_tested_version_is_the_pinned_one() -> None:
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert pinned[1] == TESTED_RAY, (
        "constraints.txt has another Ray: run the tests in tests/ray with it, then change TESTED_RAY"
    )


@pytest.mark.parametrize(("installed", "warns"), [("2.59.1", False), (TESTED_RAY, False), ("2.60.1", True)])
def test_only_a_newer_ray_is_warned_of(installed: str, warns: bool) -> None:
    message = describe_untested_ray(installed)
    assert (message is not None) is warns
    if message:
        assert "\n" not in message
        assert f"install ray=={TESTED_RAY}" in message


def test_the_warning_comes_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ray_internals, "version", lambda name: "99.0.0")
    warn_untested_ray.cache_clear()
    warn_untested_ray()
    warn_untested_ray()
    assert capsys.readouterr().err.count("Ray 99.0.0 is installed") == 1
    warn_untested_ray.cache_clear()


@pytest.mark.parametrize("name", DATA_SETTINGS)
def test_ray_data_has_the_setting(name: str) -> None:
    assert hasattr(DataContext.get_current(), name), f"ray.data.DataContext has no {name}: see pipelines.cluster"


def test_settings_are_restored() -> None:
    context = DataContext.get_current()
    before = context.max_errored_blocks
    with data_settings({"max_errored_blocks": before + 1}):
        assert context.max_errored_blocks == before + 1
    assert context.max_errored_blocks == before


def test_ray_data_logs_below_its_logger() -> None:
    names = logging.root.manager.loggerDict
    assert any(name.startswith(f"{DATA_LOGGER}.") for name in names), (
        f"Ray Data has no logger below {DATA_LOGGER}: quiet_data does not silence it"
    )


@pytest.mark.parametrize("text", IGNORED_WARNINGS)
def test_ray_data_has_the_warning(text: str) -> None:
    assert any(text in path.read_text() for path in (RAY / "data").rglob("*.py")), (
        f"Ray Data no longer warns with {text!r}: remove it from IGNORED_WARNINGS, or write the new text"
    )


def test_rays_core_reads_its_log_level() -> None:
    with (RAY / "_raylet.so").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as core:
        assert core.find(CORE_LOG_LEVEL.encode()) >= 0, (
            f"Ray's core no longer reads {CORE_LOG_LEVEL}: quiet_core does not silence it"
        )


def test_ray_reads_whether_to_print_errors_that_nobody_fetched() -> None:
    assert IGNORE_UNHANDLED in inspect.getsource(ray._private.worker.Worker.raise_errors), (
        f"Ray no longer reads {IGNORE_UNHANDLED}: quiet_core does not silence it"
    )


def test_ray_installs_a_handler_for_sigterm() -> None:
    assert "set_sigterm_handler" in inspect.getsource(ray._private.worker), (
        "ray.init no longer installs a handler for SIGTERM: keep_signals may be unnecessary"
    )


def test_tasks_of_ray_data_take_a_runtime_environment_and_retries() -> None:
    parameters = inspect.signature(Dataset.map_batches).parameters
    named = {"runtime_env", "max_retries", "max_restarts", "max_task_retries"}
    accepts_any = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    assert accepts_any or named <= parameters.keys(), "Dataset.map_batches lost the options of its tasks"


def test_actors_of_one_dataset_can_go_on_in_the_next() -> None:
    hint = "see pipelines.ray_internals.keep_actors"
    pool = actor_pool_map_operator.ActorPoolMapOperator
    assert list(inspect.signature(pool._do_shutdown).parameters) == ["self", "force"], hint
    assert "self._actor_cls.options(" in inspect.getsource(pool), hint
    assert list(inspect.signature(actor_pool_map_operator._ActorPool._can_apply_request).parameters) == ["self", "req"]
    assert "self._running_actors" in inspect.getsource(actor_pool_map_operator._ActorPool), hint
    assert {"delta", "force"} <= set(inspect.signature(ActorPoolScalingRequest).parameters), hint
    forced = [
        path.name for path in RAY.glob("data/_internal/actor_autoscaler/*.py") if "force=True" in path.read_text()
    ]
    assert forced == ["default_actor_autoscaler.py"], f"what does Ray Data force a pool to? {hint}"
    assert inspect.getsource(default_actor_autoscaler).count("force=True") == 1, hint


def test_blocks_come_without_prefetching() -> None:
    assert "prefetch_batches" in inspect.signature(Dataset.iter_batches).parameters, (
        "Dataset.iter_batches lost prefetch_batches: see pipelines.cluster.iterate_rows"
    )
