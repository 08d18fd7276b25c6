"""The end of a command: errors as one line, signals, and the exit codes that scripts read."""

from __future__ import annotations

import logging
import os
import re
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
from storage.store import StoreError

FAILED, USAGE, TOO_MANY_REJECTS = 1, 2, 3
HUNG_UP, INTERRUPTED, TERMINATED = 129, 130, 143
GRACE_SECONDS = 20.0
"""How long Ray may take to shut down after a signal. Kubernetes sends SIGKILL 30 s after SIGTERM by default."""
SIGNALS = {
    signal.SIGHUP: (HUNG_UP, "the terminal was closed"),
    signal.SIGINT: (INTERRUPTED, "interrupted"),
    signal.SIGTERM: (TERMINATED, "terminated"),
}
"""The signals that end a command in an orderly way, each with its exit code and the word for it."""
RAY_DATA_HINTS = re.compile(r"^Failed to .+ after \d+/\d+ attempts", re.MULTILINE)
"""The first line of the advice that Ray Data adds to an exception's message. The advice is for programmers."""
RAY_DATA_WRAPPER = "UDF failed to process a data block."
"""The message of the exception that Ray Data raises from the original one, which only the traceback then shows."""
_CAUSE = "The above exception was the direct cause of the following exception:"
_OWN_TYPE = re.compile(r"^storage\.\w+\.\w+: ")
"""The type before the message of an exception of a store, in a traceback."""

out = Console(soft_wrap=True, emoji=False)
err = Console(stderr=True, soft_wrap=True, emoji=False)


GO_ON = "what is committed stays, run the same command to go on"
"""What a user should know who has interrupted a command that commits its work step by step."""


@contextmanager
def report_errors(interrupted: str = "") -> Iterator[None]:
    """Turn an exception into one line on stderr and an exit code. Turn signals into an orderly shutdown.

    `ConfigError` ends with 2, a signal of `SIGNALS` with its exit code, and other exceptions with 1, such as a
    `StoreError` of a store that does not answer. After a signal the process ends within `GRACE_SECONDS` in any case,
    and further ones are ignored, such as a second Ctrl-C. A signal that was ignored before stays so, as with nohup.
    `interrupted` is what the user should know then. With SIGHTLINE_TRACEBACK=1 other exceptions show their traceback.
    """
    received: list[int] = []

    def terminate(number: int, _frame: FrameType | None) -> None:
        for one in previous:  # a second one would interrupt the shutdown
            signal.signal(one, signal.SIG_IGN)
        logging.disable()  # Ray Data would log the stack at which it was interrupted
        received.append(number)
        last_resort = threading.Timer(GRACE_SECONDS, os._exit, [SIGNALS[signal.Signals(number)][0]])
        last_resort.daemon = True
        last_resort.start()
        timers.append(last_resort)
        raise KeyboardInterrupt if number == signal.SIGINT else _Terminated

    def fail_by_signal() -> NoReturn:
        code, word = SIGNALS[signal.Signals(received[0])] if received else SIGNALS[signal.SIGINT]
        fail(f"{word}: {interrupted}" if interrupted else word, code)

    timers: list[threading.Timer] = []
    previous = {one: signal.getsignal(one) for one in SIGNALS if signal.getsignal(one) is not signal.SIG_IGN}
    for one in previous:
        signal.signal(one, terminate)
    try:
        yield
    except ConfigError as error:
        fail(str(error), USAGE)
    except (KeyboardInterrupt, _Terminated):
        fail_by_signal()
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if received:  # Ray turns an exception that a signal handler raises in its code into its own
            fail_by_signal()
        if os.environ.get("SIGHTLINE_TRACEBACK"):
            raise
        if isinstance(error, StoreError):  # its message says what failed, for commands without a run too
            fail(summarize_error(error), FAILED)
        fail(f"the run failed: {summarize_error(error)} (SIGHTLINE_TRACEBACK=1 shows where)", FAILED)
    finally:
        for one, handler in previous.items():  # the process ends after a signal, and no other one may interrupt that
            signal.signal(one, signal.SIG_IGN if received else handler)
        for timer in timers:
            timer.cancel()


def summarize_error(error: Exception) -> str:
    """Return the last line of an exception's message, which is the original exception's for an exception of Ray.

    Ray's exceptions have the original one as `cause`, and the worker's traceback as their text.
    """
    cause = getattr(error, "cause", None) or error
    message = _without_hints(str(cause))
    if message.strip() == RAY_DATA_WRAPPER:
        # The exception before the last one: what is before that may be a cause that a store has explained.
        _, *originals = reversed(str(error).split(_CAUSE))
        message = originals[0] if originals else message
    lines = [line for line in message.splitlines() if line.strip()]
    return _OWN_TYPE.sub("", lines[-1].strip()) if lines else type(cause).__name__


def _without_hints(message: str) -> str:
    found = RAY_DATA_HINTS.search(message)
    return message[: found.start()] if found else message


class _Terminated(BaseException):
    """SIGTERM or SIGHUP arrived. Raised through all frames as Ctrl-C is, so that Ray is shut down."""


def fail(message: str, code: int) -> NoReturn:
    """Print what is wrong to stderr, on one line, and end with an exit code."""
    err.print(f"[red]sightline:[/red] {escape(' '.join(message.split()))}", highlight=False)
    sys.stdout.flush()
    raise typer.Exit(code)
