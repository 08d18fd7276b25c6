"""The one line that a failed command prints."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console

from sightline.exits import RAY_DATA_HINTS, RAY_DATA_WRAPPER, err, out, summarize_error

HINTS = "\nFailed to apply UDF transform after 1/1 attempts (total backoff 0.0s).\nTo change retry attempts, ..."
TRACEBACK = """ray::MapBatches(bad)() (pid=1)
RuntimeError: first line
the real message

The above exception was the direct cause of the following exception:

ray.exceptions.UserCodeException: """
EXPLAINED = """ray::MapBatches(write)() (pid=1)
botocore.exceptions.ClientError: An error occurred (SlowDown)

The above exception was the direct cause of the following exception:

ray::MapBatches(write)() (pid=1)
storage.store.Unreachable: s3://a/b: S3 answered SlowDown

The above exception was the direct cause of the following exception:

ray.exceptions.UserCodeException: """


class TaskError(Exception):
    """Like Ray's RayTaskError: `cause` is the original exception, or the one that Ray Data made of it."""

    def __init__(self, text: str, cause: Exception) -> None:
        super().__init__(text)
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("what is wrong\n"), "what is wrong"),
        (ValueError(), "ValueError"),
        (ValueError(f"what is wrong{HINTS}"), "what is wrong"),
        (TaskError("a traceback", OSError("the disk is full")), "the disk is full"),
        (TaskError("a traceback", ValueError(f"what is wrong{HINTS}")), "what is wrong"),
        (TaskError(TRACEBACK, ValueError(RAY_DATA_WRAPPER + HINTS)), "the real message"),
        (TaskError(EXPLAINED, ValueError(RAY_DATA_WRAPPER + HINTS)), "s3://a/b: S3 answered SlowDown"),
        (TaskError("a traceback", ValueError(RAY_DATA_WRAPPER)), RAY_DATA_WRAPPER),
    ],
)
def test_the_line_is_the_original_exceptions(error: Exception, line: str) -> None:
    assert summarize_error(error) == line


def test_ray_data_still_writes_what_is_looked_for() -> None:
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    internal = Path(spec.origin).parent / "data/_internal"
    assert RAY_DATA_HINTS.search("Failed to apply UDF transform after 1/1 attempts")
    hints = (internal / "util.py").read_text()
    assert 'f"Failed to {description} after {attempts}/{max_attempts} "' in hints, "Ray Data's advice has another text"
    wrapper = (internal / "planner/plan_udf_map_op.py").read_text()
    assert RAY_DATA_WRAPPER.removesuffix(".") in wrapper, "Ray Data wraps exceptions with another message"


@pytest.mark.parametrize("console", [out, err])
def test_a_name_between_colons_is_printed_as_it_is(console: Console) -> None:
    """A folder `a:x:b` was shown with a cross in its middle."""
    with console.capture() as captured:
        console.print("a:x:b/:dog:")
    assert captured.get() == "a:x:b/:dog:\n"
