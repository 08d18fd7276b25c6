"""The beginning and the end of the command line's process.

Ctrl-C ends a command in one line also while its modules are imported.

The process ends without the interpreter's finalization. Threads of Arrow may still be releasing what they have read,
for which they need the interpreter. If it is finalized then, C++ ends the process with SIGABRT after all work is done:
of 160 runs of `sightline verify` on a busy machine, 28 ended with exit code 134 instead of 0.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line, and end the process: the console script `sightline`."""
    try:
        from sightline.cli import app
    except KeyboardInterrupt:
        print("sightline: interrupted", file=sys.stderr)
        sys.exit(130)
    code: str | int | None = 0
    try:
        app()
    except SystemExit as done:
        code = done.code
    end_process(code if isinstance(code, int) else int(code is not None))


def end_process(code: int) -> NoReturn:
    """End the process as the interpreter does, up to its finalization: wait for threads, run what atexit has, flush."""
    threading._shutdown()  # type: ignore[attr-defined]  # joins the threads of executors too
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader of a pipe is gone, or the stream is closed
            stream.flush()
    os._exit(code)
