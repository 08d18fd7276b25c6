"""The decoder server and its decoders: the processes in which images are decoded.

`siglip.images.decoder_server` starts the server as `python -m siglip.images.decoder_process server FD`. The server
loads torch's resize, simplejpeg, Pillow and numpy once, and forks a decoder on request. Forked decoders share the
memory of these libraries, and a crashed decoder is replaced in milliseconds. The server never decodes an image of a
user, and ends with all its decoders when the process that started it is gone.

Only a process with one thread can be forked safely: a lock that another thread holds would stay locked in the copy.
The server therefore counts its threads before every fork. With more than one, or where they cannot be counted
(outside Linux), it starts the decoder as a new process (exec), which is slower and shares no memory.

Forked decoders have the same address space layout (ASLR) as their server, unlike processes started by exec. Code that
has taken over a decoder sees the environment variables, as in every child process, but no descriptors of others. It
runs as the same user as the other processes, and can send signals to them.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
import warnings
from contextlib import suppress
from functools import cache
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from siglip.config import Limits
from siglip.images.decode import ImageRejected, decode_image
from siglip.images.protocol import (
    FORK,
    REQUEST,
    SLOTS,
    STATUS,
    UNKNOWN_STATUS,
    DecoderSettings,
    SlotResult,
    read_bytes,
    read_message,
    send_ready,
    send_rejection,
    send_result,
)

BYTES_PER_PIXEL = 36
"""Memory that one pixel may take while an image is decoded. The largest known is a WebP with alpha: two canvases of
libwebp, its copy, and Pillow's image, background, composite and RGB, four bytes each; and one more for a turn."""
_SPARE_BYTES = 128 * 2**20
"""Memory for libraries that are loaded with the first image of a format, and for the fixed costs of small images."""
_PR_SET_PDEATHSIG = 1


class _Request(NamedTuple):
    operation: int
    number: int
    policy: int
    settings: bytes
    files: list[int]


def serve_forks(control: socket.socket) -> None:
    """The server's loop: start and end decoders on request. Returns when the process that started it is gone."""
    # Signals of a terminal go to the whole process group. The server ends with the process that started it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # a thread of the starting process may have blocked some
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    _load_libraries()
    running: dict[int, int] = {}
    ended: dict[int, int] = {}
    try:
        while True:
            ready, _, _ = select.select([control.fileno(), woken], [], [])
            if woken in ready:
                os.read(woken, 4096)
                _reap(running, ended)
            if control.fileno() in ready:
                request = _read_request(control)
                if request.operation == FORK:
                    # A process or descriptor limit must not end the server, and with it the other decoders. The
                    # reader notices that the decoder's socket is closed.
                    try:
                        running[request.number] = _start_decoder(request)
                    except (OSError, ValueError):
                        traceback.print_exc()
                else:
                    status = _end_decoder(request.number, running, ended)
                    control.sendall(STATUS.pack(request.number, status))
    except (EOFError, ConnectionError):
        for number in list(running):
            _end_decoder(number, running, ended)


def _load_libraries() -> None:
    """Import everything that decoding needs, and run it once, so that decoders share what it allocates."""
    import gc
    import io

    import simplejpeg

    from siglip.images.resize import resize

    Image.init()
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    resize(simplejpeg.decode_jpeg(buffer.getvalue()), (16, 16), Image.Resampling.BICUBIC)
    gc.collect()
    gc.freeze()  # the garbage collector would write to these objects, and so copy their pages in each decoder


def _read_request(control: socket.socket) -> _Request:
    data, files, _, _ = socket.recv_fds(control, REQUEST.size, 2)
    if not data:
        raise EOFError
    data += read_bytes(control, REQUEST.size - len(data))
    operation, number, policy, size = REQUEST.unpack(data)
    return _Request(operation, number, policy, bytes(read_bytes(control, size)), files)


def _start_decoder(request: _Request) -> int:
    """Start a decoder and return its process id. Raises `OSError` or `ValueError` when a limit does not allow it."""
    server = os.getpid()
    try:
        connection, memory = request.files
        if _count_threads() != 1:
            return _spawn_decoder(request, server)
        pid = os.fork()
        if not pid:
            _become_decoder(connection, memory, request.settings, request.policy, server)
        return pid
    finally:
        for file in request.files:
            os.close(file)


def _count_threads() -> int | None:
    """Threads of this process, also those that Python did not start; None where the kernel does not say."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return None


def _spawn_decoder(request: _Request, server: int) -> int:
    """Start a decoder by exec, with nothing of this process's memory."""
    for file in request.files:
        os.set_inheritable(file, True)
    values = [*request.files, request.policy, server, request.settings.decode()]
    arguments = [sys.executable, "-P", "-m", "siglip.images.decoder_process", "decoder", *map(str, values)]
    return os.posix_spawn(sys.executable, arguments, os.environ)


def _end_decoder(number: int, running: dict[int, int], ended: dict[int, int]) -> int:
    """End a decoder if it has not ended itself, and return its exit status."""
    if number in running:
        pid = running.pop(number)
        os.kill(pid, signal.SIGKILL)  # not yet waited for: the id is still this decoder's
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return ended.pop(number, UNKNOWN_STATUS)


def _reap(running: dict[int, int], ended: dict[int, int]) -> None:
    """Keep the exit statuses of decoders that have ended, so that none stays as a zombie."""
    for number, pid in list(running.items()):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            del running[number]
            ended[number] = os.waitstatus_to_exitcode(status)


def _become_decoder(connection: int, memory: int, settings: bytes, policy: int, server: int) -> NoReturn:
    """Decode until the other end of `connection` is gone, then end this process. Never returns."""
    status = 1
    try:
        _prepare_process(connection, memory, policy, server)
        decoder_settings = DecoderSettings.from_json(settings)
        pixels = np.frombuffer(mmap.mmap(memory, 0), np.uint8)
        os.close(memory)
        _decode_images(socket.socket(fileno=connection), pixels, decoder_settings)
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _prepare_process(connection: int, memory: int, policy: int, server: int) -> None:
    """Make a forked or spawned process a decoder: its own descriptors, signals, title and scheduling policy."""
    Image.MAX_IMAGE_PIXELS = None  # `limits.max_pixels` is checked, and may be higher than Pillow's own limit
    warnings.simplefilter("ignore")  # Pillow's about odd files; this process runs no other code that could warn
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent(server)
    _close_files({0, 1, 2, connection, memory})
    _set_title("decoder")
    if policy >= 0:
        with suppress(OSError):
            os.sched_setscheduler(0, policy, os.sched_param(0))


def _end_with_parent(server: int) -> None:
    """Have the kernel kill this process when its server ends, also when the server is killed itself. Only Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != server:  # it died before the kernel was asked
        os._exit(1)


def _close_files(keep: set[int]) -> None:
    """Close all descriptors but those in `keep`: the server's control socket above all."""
    try:
        files = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        files = list(range(3, 256))
    for file in files:
        if file not in keep:
            with suppress(OSError):  # the descriptor that listed the others is closed already
                os.close(file)


def _set_title(name: str) -> None:
    """Set the name that tools show for this process, at most 15 bytes. Does nothing outside Linux."""
    with suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write(name)


def _decode_images(connection: socket.socket, memory: NDArray[np.uint8], settings: DecoderSettings) -> None:
    """The decoder's loop: encoded images in, pixels into slots and a result for each out, until the reader is gone."""
    layout = settings.layout()
    try:
        send_ready(connection, os.getpid())  # an image's time limit must not include the imports
        for number in itertools.count():
            data = bytes(read_message(connection))
            started = time.perf_counter()
            _limit_memory(settings.limits)
            slot = number % SLOTS
            pixels, room = layout.slot(memory, slot)
            try:
                decoded = decode_image(data, settings.spec, settings.limits, settings.mode, settings.thumbnail, pixels)
            except ImageRejected as rejected:
                send_rejection(connection, slot, rejected)
                continue
            small = np.frombuffer(decoded.thumbnail or b"", np.uint8)
            room[: len(small)] = small
            seconds = time.perf_counter() - started
            send_result(connection, slot, SlotResult(decoded.width, decoded.height, len(small), seconds))
    except (EOFError, ConnectionError):
        return


def _limit_memory(limits: Limits) -> None:
    """Let this process take the memory that the largest allowed image needs beyond what it has now, and no more.

    The limit is on address space (RLIMIT_AS), because the kernel has no limit on touched memory. An image that wants
    more is rejected like one whose bytes are broken, or its decoder dies and is replaced.
    """
    try:
        pages = int(os.pread(_memory_file(), 64, 0).split()[0])
    except OSError:  # only Linux has the file
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = pages * resource.getpagesize()
    soft = now + _SPARE_BYTES + BYTES_PER_PIXEL * limits.max_pixels + 2 * limits.max_bytes
    resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


@cache
def _memory_file() -> int:
    """The kernel's file about this process's memory, opened once because it is read for every image."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


def main(arguments: list[str]) -> NoReturn:
    """Run as the server (`server FD`), or as one decoder (`decoder SOCKET MEMORY POLICY SERVER SETTINGS`)."""
    role, *values = arguments
    if role == "decoder":
        connection, memory, policy, server = (int(value) for value in values[:4])
        _load_libraries()
        _become_decoder(connection, memory, values[4].encode(), policy, server)
    control = socket.socket(fileno=int(values[0]))
    control.set_inheritable(False)
    _set_title("decoder-server")
    serve_forks(control)
    os._exit(0)  # without the seconds of torch's clean-up


if __name__ == "__main__":
    main(sys.argv[1:])
