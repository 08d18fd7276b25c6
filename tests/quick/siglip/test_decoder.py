"""Decoder processes: a hang, a crash or too much memory costs one image, and no image is decoded twice."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from siglip.config import ImageSpec, Limits, prefer_throughput
from siglip.images.decode import Decoded, ImageRejected
from siglip.images.decoder import Decoder, DecoderLost, DecoderRing
from siglip.images.decoder_server import DecoderServer
from siglip.images.protocol import (
    DETAIL_BYTES,
    DecoderSettings,
    ProtocolError,
    SlotResult,
    read_result,
    send_rejection,
    send_result,
)
from tests.support.images import encode, make_rgb
from tests.support.workers import find_decoders

HOOK = """
import os, pickle, signal, socket, stat, time
from PIL import PngImagePlugin
original = PngImagePlugin.PngImageFile.load
def load(self, *arguments):
    with open({log!r}, "a") as log:
        print(self.width, file=log)
    if self.width == 14:
        time.sleep(600)
    if self.width == 15:
        self.hoard = bytearray(4 * 2**30)
    if self.width == 16:
        [ours] = [file for file in range(3, 64) if is_socket(file)]
        os.write(ours, pickle.dumps("a message that unpickling would turn into code"))
    if self.width == 17:
        os.kill(os.getpid(), signal.SIGSEGV)
    if self.width == 18 and open({log!r}).read().split().count("18") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if self.width == 19:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    return original(self, *arguments)
def is_socket(file):
    try:
        return stat.S_ISSOCK(os.fstat(file).st_mode)
    except OSError:
        return False
def say_start():
    with open({log!r}, "a") as log:
        print("start", file=log)
PngImagePlugin.PngImageFile.load = load
os.register_at_fork(after_in_child=say_start)
"""
THREAD = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
FAILING_FORK = """
original_fork = os.fork
def fork():
    if os.path.exists({fails!r}):
        os.unlink({fails!r})
        raise BlockingIOError("a limit on processes")
    return original_fork()
os.fork = fork
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks decoders")


def install_hook(folder: Path, monkeypatch: pytest.MonkeyPatch, more: str = "") -> Path:
    """Have processes that Python starts run `HOOK`. Returns the file in which decoders write what they do."""
    log = folder / "decoded"
    (folder / "sitecustomize.py").write_text(HOOK.format(log=str(log)) + more)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    return log


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DecoderServer, Path]]:
    """A decoder server that runs `HOOK`, for most tests of this module because its start takes seconds; and its log."""
    with pytest.MonkeyPatch.context() as patch:
        log = install_hook(tmp_path_factory.mktemp("hook"), patch)
        server = DecoderServer()
        server._running.add(-1)  # so that it does not end with the last decoder of a test
        yield server, log
        server._stop()


@pytest.fixture(autouse=True)
def shared_server(hooked: tuple[DecoderServer, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders of a test are started by the module's server."""
    monkeypatch.setattr("siglip.images.decoder.SERVER", hooked[0])


@pytest.fixture
def own_server(shared_server: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[DecoderServer]:
    """Decoders of a test are started by a server of its own, which starts with the first of them."""
    server = DecoderServer()
    monkeypatch.setattr("siglip.images.decoder.SERVER", server)
    yield server
    server._stop()


@pytest.fixture
def log(hooked: tuple[DecoderServer, Path]) -> Path:
    """By an image's width, a decoder sleeps (14), takes 4 GiB (15), sends a pickle (16), crashes (17), is killed at the
    first attempt (18), or is killed together with its server (19).

    Returns the file in which decoders write their starts and the widths of images.
    """
    log = hooked[1]
    log.write_text("")
    return log


def decode(widths: list[int], limits: Limits) -> list[str | int]:
    """For each width the image's reason, or its width."""
    decoder = Decoder(ImageSpec(size=32), limits)
    try:
        outcomes = decoder.decode([encode(make_rgb(width, 30)) for width in widths])
    finally:
        decoder.close()
    return [outcome.reason if isinstance(outcome, ImageRejected) else outcome.width for outcome in outcomes]


def our_decoders() -> set[psutil.Process]:
    """The decoders of this process."""
    return set(find_decoders(psutil.Process().children(recursive=True)))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.alone
def test_a_hang_costs_no_second_decode_of_the_others(log: Path) -> None:
    widths = [20, 21, 14, 22]
    assert decode(widths, Limits(max_seconds=1)) == [20, 21, "decoder_timeout", 22]
    seen = [int(line) for line in log.read_text().split() if line != "start"]
    assert sorted(set(seen)) == sorted(widths)
    assert all(seen.count(width) <= seen.count(20) for width in widths), "once each"


def test_an_image_that_wants_too_much_memory_is_rejected(log: Path) -> None:
    assert decode([20, 15, 21], Limits(max_pixels=1_000_000, max_bytes=2**20)) == [20, "out_of_memory", 21]
    assert decode([1000], Limits(max_pixels=30_000)) == [1000], "an allowed image must have enough memory"


@pytest.mark.alone
def test_a_ring_of_decoders_keeps_the_order(log: Path) -> None:
    ring = DecoderRing(ImageSpec(size=32), Limits(max_seconds=1))
    ring.resize(3)
    widths = [20, 14, 21, 22, 23, 24, 14, 25]
    for width in widths:
        ring.submit(encode(make_rgb(width, 30)))
    assert len(ring) == len(widths)
    assert len(our_decoders()) == 3
    pixels = np.zeros((32, 32, 3), np.uint8)
    outcomes = [ring.take(pixels) for _ in widths]
    found = [outcome.reason if isinstance(outcome, ImageRejected) else outcome.width for outcome in outcomes]
    assert found == [20, "decoder_timeout", 21, 22, 23, 24, "decoder_timeout", 25]
    assert pixels.any(), "the pixels of the last image"
    ring.submit(encode(make_rgb(20, 30)))
    ring.resize(1)
    assert len(ring) == 0
    ring.submit(encode(make_rgb(31, 30)))
    outcome = ring.take()
    assert isinstance(outcome, Decoded)
    assert outcome.width == 31, "the image that waited was discarded"
    ring.close()


def test_a_rings_decoders_start_together(log: Path) -> None:
    """Without forking each needs a second or two of imports: 16 one after the other would keep a GPU idle."""
    ring = DecoderRing(ImageSpec(size=32), Limits())
    ring.resize(3)
    for width in (20, 21, 22):
        ring.submit(encode(make_rgb(width, 30)))
    outcomes = [ring.take() for _ in range(3)]
    ring.close()
    assert [isinstance(outcome, Decoded) for outcome in outcomes] == [True] * 3
    assert log.read_text().split().count("start") == 3


def test_a_rings_decoders_may_be_ready_before_the_first_image(log: Path) -> None:
    """A job's decoders are loaded while its model is, so that no actor waits for their first images."""
    ring = DecoderRing(ImageSpec(size=32), Limits())
    ring.resize(2)
    ring.wait()
    children = our_decoders()
    loaded = [any("libtorch" in library.path for library in child.memory_maps()) for child in children]
    for width in (20, 21):
        ring.submit(encode(make_rgb(width, 30)))
    outcomes = [ring.take() for _ in range(2)]
    after = our_decoders()
    ring.close()
    assert loaded == [True, True]
    assert [isinstance(outcome, Decoded) for outcome in outcomes] == [True, True]
    assert after == children


@linux
def test_decoders_share_the_memory_of_their_libraries() -> None:
    ring = DecoderRing(ImageSpec(size=64), Limits())
    ring.resize(2)
    for _ in range(4):
        ring.submit(encode(make_rgb(100, 100), "JPEG"))
    assert all(isinstance(ring.take(), Decoded) for _ in range(4))
    private = [process.memory_full_info().uss / 2**20 for process in our_decoders()]
    ring.close()
    assert len(private) == 2
    assert max(private) < 40, "MiB: a decoder that is not forked has 150"


def test_a_crashed_decoder_is_replaced_and_its_exit_status_told(log: Path) -> None:
    decoder = Decoder(ImageSpec(size=32), Limits())
    [before, crashed, after] = decoder.decode([encode(make_rgb(width, 30)) for width in (20, 17, 21)])
    decoder.close()
    assert isinstance(before, Decoded)
    assert isinstance(crashed, ImageRejected)
    assert (crashed.reason, crashed.detail) == ("decoder_crashed", "the decoder's exit status was -11")
    assert not isinstance(crashed, DecoderLost)
    assert isinstance(after, Decoded)
    assert log.read_text().split().count("17") == 2, "one more attempt, and no third one"
    assert decoder.deaths == 2


def test_a_sound_image_is_not_rejected_for_a_kill_from_outside(log: Path) -> None:
    """The OOM killer, or an operator, ends the process while it works on this image."""
    decoder = Decoder(ImageSpec(size=32), Limits())
    outcomes = decoder.decode([encode(make_rgb(width, 30)) for width in (20, 18, 21, 22)])
    decoder.close()
    assert [outcome.width for outcome in outcomes if isinstance(outcome, Decoded)] == [20, 18, 21, 22]
    assert decoder.deaths == 1


@linux
def test_an_image_whose_decoder_dies_twice_with_its_server_is_lost_and_not_found_guilty(log: Path) -> None:
    decoder = Decoder(ImageSpec(size=32), Limits())
    outcomes = decoder.decode([encode(make_rgb(width, 30)) for width in (20, 19, 21)])
    decoder.close()
    assert isinstance(outcomes[1], DecoderLost)
    assert outcomes[1].reason == "decoder_crashed"
    assert outcomes[1].detail == "the decoder server died, also at the second attempt"
    assert [outcome.width for outcome in outcomes if isinstance(outcome, Decoded)] == [20, 21]
    assert log.read_text().split().count("19") == 2


def test_after_a_decoder_could_not_be_started_the_next_images_get_their_own_results(
    shared_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError("no process may be started")

    decoder = Decoder(ImageSpec(size=32), Limits())
    first = [encode(make_rgb(width, 30)) for width in (20, 21)]
    with monkeypatch.context() as patch:
        patch.setattr(DecoderServer, "start_decoder", refuse)
        with pytest.raises(OSError, match="no process"):
            decoder.decode(first)
    [outcome] = decoder.decode([encode(make_rgb(22, 30))])
    decoder.close()
    assert isinstance(outcome, Decoded)
    assert outcome.width == 22


def test_an_idle_decoder_that_is_killed_leaves_no_zombie_and_costs_no_image() -> None:
    decoder = Decoder(ImageSpec(size=32), Limits())
    decoder.wait()
    assert decoder.pid is not None
    killed = decoder.pid
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(killed), "the server collects its exit status")
    [first, second] = decoder.decode([encode(make_rgb(width, 30)) for width in (20, 21)])
    assert isinstance(first, Decoded)
    assert isinstance(second, Decoded)
    assert (first.width, second.width) == (20, 21)
    decoder.close()


def test_a_decoder_that_sends_something_else_has_crashed(log: Path) -> None:
    decoder = Decoder(ImageSpec(size=32), Limits())
    outcomes = decoder.decode([encode(make_rgb(width, 30)) for width in (20, 16, 21)])
    decoder.close()
    found = [outcome.reason if isinstance(outcome, ImageRejected) else outcome.width for outcome in outcomes]
    assert found == [20, "decoder_crashed", 21]
    assert isinstance(outcomes[1], ImageRejected)
    assert outcomes[1].detail.startswith("the decoder sent")


@pytest.mark.slow
@linux
def test_decoders_end_with_their_server_and_it_is_replaced(own_server: DecoderServer) -> None:
    ring = DecoderRing(ImageSpec(size=32), Limits())
    ring.resize(2)
    ring.wait()
    before = our_decoders()
    assert own_server._process is not None
    own_server._process.kill()
    wait_until(lambda: not any(process.is_running() for process in before), "they end with it")
    for width in (20, 21, 22, 23):
        ring.submit(encode(make_rgb(width, 30)))
    outcomes = [ring.take() for _ in range(4)]
    ring.close()
    assert [type(outcome) for outcome in outcomes] == [Decoded] * 4, "no image is rejected for it"
    assert own_server._process is None, "it ends with the last decoder"


READER = """
import sys
from siglip.config import ImageSpec, Limits
from siglip.images.decoder import Decoder
decoder = Decoder(ImageSpec(size=32), Limits())
decoder.wait()
decoder.submit(open(sys.argv[1], "rb").read())
print("submitted", flush=True)
decoder.take()
"""


def test_decoders_end_with_a_killed_reader_also_while_they_hang(log: Path, tmp_path: Path) -> None:
    image = tmp_path / "hangs.png"
    image.write_bytes(encode(make_rgb(14, 30)))
    reader = subprocess.Popen([sys.executable, "-c", READER, str(image)], stdout=subprocess.PIPE)
    assert reader.stdout is not None
    assert reader.stdout.readline() == b"submitted\n"
    wait_until(lambda: "14" in log.read_text().split(), "it decodes")
    below = psutil.Process(reader.pid).children(recursive=True)
    assert len(below) == 2, "the server and its decoder"
    reader.kill()
    reader.communicate()
    wait_until(lambda: not any(is_alive(process) for process in below), "both end")


def is_alive(process: psutil.Process) -> bool:
    """False for a zombie: where no process collects orphans, an orphan stays one."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@linux
def test_a_decoder_has_no_descriptors_of_others_and_cannot_shrink_its_memory() -> None:
    ring = DecoderRing(ImageSpec(size=32), Limits())
    ring.resize(3)
    ring.wait()
    sockets = []
    for process in our_decoders():
        folder = Path(f"/proc/{process.pid}/fd")
        files = [file for file in folder.iterdir() if int(file.name) > 2]
        sockets += [file.readlink() for file in files if stat.S_ISSOCK(file.stat().st_mode)]
        assert not any(stat.S_ISFIFO(file.stat().st_mode) for file in files), "the server's own pipe"
        memory = [file for file in files if "memfd" in str(file.readlink())]
        assert len({file.stat().st_ino for file in memory}) == 1, "its own"
        with pytest.raises(PermissionError):
            os.truncate(memory[0], 0)
    ring.close()
    assert len(sockets) == len(set(sockets)) == 3, "one each"


@pytest.mark.alone
@linux
def test_a_server_with_a_second_thread_starts_decoders_without_forking(
    own_server: DecoderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = install_hook(tmp_path, monkeypatch, THREAD)
    assert decode([20, 14, 21], Limits(max_seconds=1)) == [20, "decoder_timeout", 21]
    assert "start" not in log.read_text().split()


@linux
def test_a_fork_that_fails_ends_neither_the_server_nor_other_decoders(
    own_server: DecoderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = tmp_path / "fails"
    install_hook(tmp_path, monkeypatch, FAILING_FORK.format(fails=str(fails)))
    ring = DecoderRing(ImageSpec(size=32), Limits())
    ring.resize(1)
    ring.wait()
    first = our_decoders()
    fails.touch()
    ring.resize(2)
    ring.wait()
    assert not fails.exists(), "the fork failed"
    assert len(our_decoders()) == 2
    assert first < our_decoders()
    ring.close()


SETTINGS = DecoderSettings(ImageSpec(size=32), Limits(max_pixels=100), thumbnail=8)
RESULT = struct.Struct("=BHIIIHd")


def read_sent(*messages: bytes, seconds: float = 5.0) -> SlotResult | ImageRejected:
    """What the reader makes of a decoder's bytes for the image in slot 3."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for message in messages:
            theirs.sendall(message)
        return read_result(ours, 3, SETTINGS, SETTINGS.layout(), seconds)


def test_results_and_rejections_arrive_as_they_were_sent() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        result = SlotResult(10, 10, 4000, 0.25)
        send_result(theirs, 3, result)
        assert read_result(ours, 3, SETTINGS, SETTINGS.layout(), 5) == result
        send_rejection(theirs, 3, ImageRejected("corrupt", "\udcff" + "ä" * DETAIL_BYTES))
        rejected = read_result(ours, 3, SETTINGS, SETTINGS.layout(), 5)
    assert isinstance(rejected, ImageRejected)
    assert rejected.reason == "corrupt"
    assert rejected.detail.startswith("?ää")
    assert len(rejected.detail) <= DETAIL_BYTES


@pytest.mark.parametrize(
    "record",
    [
        (9, 3, 0, 0, 0, 0, 0.0),  # no such reason
        (0, 4, 9, 9, 0, 0, 0.0),  # another image's slot
        (0, 3, 11, 10, 0, 0, 0.0),  # more pixels than allowed
        (0, 3, 2**32 - 1, 2**32 - 1, 0, 0, 0.0),
        (0, 3, 0, 9, 0, 0, 0.0),  # no pixels
        (0, 3, 9, 9, 2**31, 0, 0.0),  # a thumbnail that is larger than its room
        (7, 3, 0, 0, 0, DETAIL_BYTES + 1, 0.0),  # a longer text than allowed
        (0, 3, 9, 9, 0, 5, 0.0),  # a text where none belongs
        (0, 3, 9, 9, 0, 0, float("nan")),
        (0, 3, 9, 9, 0, 0, -1.0),
    ],
)
def test_a_record_that_does_not_fit_is_refused(record: tuple[int, int, int, int, int, int, float]) -> None:
    with pytest.raises(ProtocolError):
        read_sent(RESULT.pack(*record), b"x" * 2000)


def test_a_pickle_is_refused_and_a_text_in_another_encoding_is_not() -> None:
    with pytest.raises(ProtocolError):
        read_sent(pickle.dumps(("decoded", list(range(100)))))
    rejected = read_sent(RESULT.pack(7, 3, 0, 0, 0, 2, 0.0), b"\xff\xfe")
    assert isinstance(rejected, ImageRejected)
    assert rejected.detail == "\ufffd\ufffd"


def test_half_a_record_does_not_hold_the_reader() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        read_sent(RESULT.pack(7, 3, 0, 0, 0, 2, 0.0), b"x", seconds=0.2)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("where", ["read_ready", "read_result", "Decoder._send"])
def test_an_interrupted_image_is_not_the_next_shards(where: str, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray interrupts the readers of a run that failed, and the same workers read for the next run."""
    ring = DecoderRing(ImageSpec(size=32), Limits())
    ring.resize(1)

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    def decode_one(width: int) -> Decoded | ImageRejected:
        ring.submit(encode(make_rgb(width, 30)))
        return ring.take()

    with monkeypatch.context() as patch:
        patch.setattr(f"siglip.images.decoder.{where}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            decode_one(21)
    ring.resize(1)
    outcome = decode_one(22)
    ring.close()
    assert isinstance(outcome, Decoded)
    assert outcome.width == 22


@pytest.mark.alone
def test_a_decoder_that_stops_reading_does_not_block_its_reader(log: Path) -> None:
    """Images larger than a socket's buffer, behind one that hangs: sending them must not hang too."""
    decoder = Decoder(ImageSpec(size=32), Limits(max_seconds=1))
    large = encode(Image.effect_noise((1500, 1500), 100).convert("RGB"))
    assert len(large) > 3 * 2**20
    widths = ["decoder_timeout", 1500, 1500, 1500]
    outcomes = decoder.decode([encode(make_rgb(14, 30)), large, large, large])
    found = [outcome.reason if isinstance(outcome, ImageRejected) else outcome.width for outcome in outcomes]
    decoder.close()
    assert found == widths


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has the policy")
def test_a_decoder_has_the_scheduling_policy_of_the_thread_that_starts_it() -> None:
    """A job's decoders run under SCHED_BATCH. The thread of this test ends with it, so that other tests do not."""

    def start_decoder() -> int:
        decoder = Decoder(ImageSpec(size=64), Limits())
        decoder.decode([encode(make_rgb(8, 8))])
        assert decoder.pid is not None
        try:
            return os.sched_getscheduler(decoder.pid)
        finally:
            decoder.close()

    def start_batch() -> int:
        prefer_throughput()
        return start_decoder()

    before = Decoder(ImageSpec(size=64), Limits())
    before.wait()  # the server was started by a thread without the policy
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(start_batch).result() == os.SCHED_BATCH
    assert start_decoder() == os.sched_getscheduler(0) != os.SCHED_BATCH
    before.close()
