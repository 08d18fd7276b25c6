"""A guard beside each HAProxy: if HAProxy ends unexpectedly, a stand-in serves until Ray Serve has started another.

Ray Serve checks HAProxy every few seconds, and starts another one after three failed checks, which takes half a minute
by default. Until then clients would be refused.

The stand-in has HAProxy's last configuration and another admin socket, so Ray Serve's checks fail as without it. It
does not learn of new ingresses. The next HAProxy takes its listening sockets over (`take_over`).
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ADMIN = re.compile(r"^(\s*stats socket )(\S+)(.*)$", re.MULTILINE)
"""The line of HAProxy's configuration with the path of its admin socket."""
SPARE_SOCKET = "spare.sock"
"""The stand-in's admin socket. Its name is not longer than that of HAProxy's, because HAProxy limits the path."""
SPARE_CONFIG = "spare.cfg"
STOPPING = "stopping"
"""A file that tells the guards of a folder that HAProxy is being stopped."""
STOP_SECONDS = 2.0
"""When Ray Serve stops its HAProxy, it kills it and, within this time, the actor that started it. When HAProxy has
ended otherwise, Ray Serve kills the actor later, after three failed checks."""
REPLACE_SECONDS = 120.0
"""How long a stand-in serves at most after HAProxy's end if the actor has ended too: Ray Serve has then stopped."""
DRAIN_SECONDS = 60.0
"""How long a stand-in that is told to stop may take to finish its requests."""


class Watched:
    """A process that is not necessarily a child of this one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._file: int | None = None
        with suppress(ProcessLookupError):
            self._file = os.pidfd_open(pid)

    def has_ended(self, seconds: float = 0.0) -> bool:
        """Whether the process ends within `seconds`."""
        if self._file is None:
            return True
        poll = select.poll()
        poll.register(self._file, select.POLLIN)
        return bool(poll.poll(seconds * 1000))


def find_pid(admin: Path) -> int | None:
    """Return the process id of the HAProxy that answers at an admin socket, None if none does."""
    with suppress(OSError, IndexError), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(admin))
        client.sendall(b"show info\n")
        text = client.makefile().read()
        return int(re.findall(r"^Pid: (\d+)$", text, re.MULTILINE)[0])
    return None


def take_over(spare: Path, pid: int, arguments: list[str]) -> list[str]:
    """Return HAProxy's `arguments`, changed so that it takes over from the stand-in with this process id.

    HAProxy gets the stand-in's listening sockets, and the stand-in ends when it has no more requests.
    """
    kept = list(arguments)
    if "-x" in kept:
        del kept[kept.index("-x") : kept.index("-x") + 2]
    if "-sf" in kept:
        kept.insert(kept.index("-sf") + 1, str(pid))
    else:
        kept += ["-sf", str(pid)]
    return [*kept, "-x", str(spare)]


def make_spare_config(config: str, folder: Path) -> str:
    """Return the stand-in's configuration. It closes idle connections at once when it is told to stop."""
    config = config.replace("option idle-close-on-response", "no option idle-close-on-response")
    return ADMIN.sub(rf"\g<1>{folder / SPARE_SOCKET}\g<3>", config)


def start_guard(admin: Path, command: list[str]) -> None:
    """Start the guard of the current process, which is about to become the HAProxy with the admin socket `admin`.

    `command` starts a stand-in.
    """
    manager = os.getppid()
    # -P: without the working directory in the path, which may have another package of this name.
    code = "import sightline; from serve.rayserve.guard import main; main()"
    pids = [str(pid) for pid in (os.getpid(), manager, _find_parent(manager))]
    arguments = [sys.executable, "-P", "-c", code, *pids, str(admin), *command]
    subprocess.Popen(arguments, stdin=subprocess.DEVNULL, start_new_session=True)


def _find_parent(pid: int) -> int:
    """The parent of a process, 1 if the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 1


class Guard:
    """What a guard knows: HAProxy, the actor that started it, the node's raylet, and HAProxy's admin socket."""

    def __init__(self, haproxy: int, manager: int, raylet: int, admin: Path) -> None:
        self._haproxy, self._manager, self._raylet = Watched(haproxy), Watched(manager), Watched(raylet)
        self._admin = admin
        self._ended = 0.0
        self._outlived_manager = False

    def wait(self) -> bool:
        """Wait until HAProxy has ended. Returns whether it had been ready, and its node still runs."""
        while find_pid(self._admin) != self._haproxy.pid:
            if self._haproxy.has_ended(0.2):  # it could not start, and Ray Serve has its messages
                return False
        while not self._haproxy.has_ended(1.0):
            if self._raylet.has_ended():  # all other processes of this node have ended or are about to
                with suppress(ProcessLookupError):
                    os.kill(self._haproxy.pid, signal.SIGTERM)
                return False
        self._ended = time.monotonic()
        self._outlived_manager = self._manager.has_ended()
        return True

    def serve(self, command: list[str]) -> None:
        """Run stand-ins with `command` until Ray Serve has started another HAProxy, or none is needed any more."""
        with suppress(BlockingIOError), self._admin.with_name("spare.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # another guard's stand-in is enough
            while not self._is_over() and find_pid(self._admin) is None:
                print(
                    "HAProxy has ended: a stand-in serves until Ray Serve starts another", file=sys.stderr, flush=True
                )
                self._run(command)
                time.sleep(0.2)

    def _is_over(self) -> bool:
        seconds = time.monotonic() - self._ended
        stopped = not self._outlived_manager and seconds < STOP_SECONDS
        if self._manager.has_ended() and (stopped or seconds > REPLACE_SECONDS):
            return True
        return self._raylet.has_ended() or self._is_stopping()

    def _is_stopping(self) -> bool:
        return self._admin.with_name(STOPPING).exists()

    def _run(self, command: list[str]) -> None:
        """Run a stand-in until it has ended, or is no longer needed."""
        stand_in = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        while stand_in.poll() is None:
            if self._is_over():
                stand_in.send_signal(signal.SIGUSR1)
                with suppress(subprocess.TimeoutExpired):
                    stand_in.wait(DRAIN_SECONDS if self._is_stopping() else 0)
                stand_in.kill()
                stand_in.wait()
                return
            time.sleep(0.1)


def main() -> None:
    """Guard a HAProxy until it has ended: the process with the arguments of `start_guard`."""
    haproxy, manager, raylet = map(int, sys.argv[1:4])
    guard = Guard(haproxy, manager, raylet, Path(sys.argv[4]))
    if guard.wait():
        guard.serve(sys.argv[5:])
