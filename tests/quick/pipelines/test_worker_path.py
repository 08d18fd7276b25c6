"""The module search path that a driver gives to Ray's workers."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import ray._private.worker
from ray.job_config import JobConfig

from pipelines.ray_internals import own_code_first

ROOT = str(Path(__file__).parents[3])


def test_workers_get_sightlines_folder_and_neither_the_working_directory_nor_the_scripts_folder() -> None:
    config = own_code_first()
    config._py_driver_sys_path.extend(["/home/user"])
    assert list(config._get_proto_job_config().py_driver_sys_path) == [ROOT]
    fresh = own_code_first()  # the protocol buffer that the other one now caches cannot be pickled
    assert pickle.loads(pickle.dumps(fresh))._py_driver_sys_path == [ROOT], "a Ray Client's server gets a plain list"


def test_ray_still_has_the_private_names_that_this_uses() -> None:
    assert "_py_driver_sys_path" in inspect.signature(JobConfig).parameters, "Ray's JobConfig lost _py_driver_sys_path"
    source = inspect.getsource(ray._private.worker.connect)
    assert "job_config._py_driver_sys_path.extend(code_paths)" in source, (
        "Ray's `connect` adds the working directory to the workers' path in another way: see pipelines/ray_internals.py"
    )
