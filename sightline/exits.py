"""How a command ends: errors as one line, and the exit codes that scripts read."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from storage.settings import ConfigError

FAILED, USAGE, TOO_MANY_REJECTS = 1, 2, 3
INTERRUPTED, TERMINATED = 130, 143
GRACE_SECONDS = 20.0
"""How long Ray may take to shut down after SIGTERM: Kubernetes sends SIGKILL after 30, if not told otherwise."""

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


@contextmanager
def report_errors() -> Iterator[None]:
    """Errors as one line and an exit code, and signals as an end that leaves no process behind."""
    terminated = threading.Event()
    last_resort = threading.Timer(GRACE_SECONDS, os._exit, [TERMINATED])
    last_resort.daemon = True

    def terminate(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the shutdown
        logging.disable()  # Ray Data would log the stack at which it was interrupted
        terminated.set()
        last_resort.start()
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except ConfigError as error:
        fail(str(error), USAGE)
    except KeyboardInterrupt:
        fail("interrupted: what is committed stays, run the same command to go on", INTERRUPTED)
    except _Terminated:
        fail("terminated: what is committed stays, run the same command to go on", TERMINATED)
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if terminated.is_set():  # Ray makes other errors of what a signal raises within it
            fail("terminated: what is committed stays, run the same command to go on", TERMINATED)
        if os.environ.get("SIGHTLINE_TRACEBACK"):
            raise
        cause = getattr(error, "cause", None) or error
        lines = [line for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
        fail(f"the run failed: {lines[-1].strip()} (SIGHTLINE_TRACEBACK=1 shows where)", FAILED)
    finally:
        signal.signal(signal.SIGTERM, previous)
        last_resort.cancel()


class _Terminated(BaseException):
    """SIGTERM arrived: unwinds like Ctrl-C, so that Ray is shut down."""


def fail(message: str, code: int) -> NoReturn:
    """Say what is wrong, on one line, and end."""
    err.print(f"[red]sightline:[/red] {escape(' '.join(message.split()))}", highlight=False)
    sys.stdout.flush()
    raise typer.Exit(code)
