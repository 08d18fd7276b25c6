"""A full disk: the run ends with one line, nothing is lost, and the same command finishes when there is space."""

from __future__ import annotations

import subprocess
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipelines.output.ledger import Ledger
from pipelines.output.output import Output
from pipelines.upkeep.verify import verify_output
from storage.store import StoreOptions
from tests.conftest import require
from tests.support.full_disk import SmallDisk, small_disk, why_not
from tests.support.jobs import Place, make_image
from tests.support.tars import make_tar

FOLDERS = ("plan", "runs", "parts", "data", "rejects", "commits", "ledger")
TARS, PER_TAR = 3, 4
KEYS = {"rows_per_shard": PER_TAR}


@pytest.fixture(autouse=True)
def _mounts() -> None:
    require("small file system", why_not())


def add_tars(place: Place, name: str) -> Counter[str]:
    """Write tars of images, the last of which cannot be decoded. Return the keys that are to be tagged."""
    for tar in range(TARS):
        images = [make_image(hash((name, tar, number)) % 10**6) for number in range(PER_TAR - 1)]
        members = [(f"{name}-{tar}-{number}.jpg", data) for number, data in enumerate([*images, b"no image"])]
        place.put(f"{name}-{tar}.tar", make_tar(members))
    return Counter(f"{name}-{tar}-{number}" for tar in range(TARS) for number in range(PER_TAR - 1))


def check_failed(done: subprocess.CompletedProcess[str], folder: str) -> None:
    said = done.stderr.strip().splitlines()
    assert done.returncode == 1, (folder, done.stdout + done.stderr)
    assert "no space left on the disk" in said[-1], (folder, said)
    assert sum(line.startswith("sightline:") for line in said) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_each_kind_of_file_finds_the_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(str(tmp_path), tmp_path)
    output = tmp_path / "output"
    expected = add_tars(place, "first")
    with ExitStack() as stack:
        disks: dict[str, SmallDisk] = {"": stack.enter_context(small_disk(output))}
        for folder in FOLDERS:
            disks[folder] = stack.enter_context(small_disk(output / folder))
        assert place.tag(**KEYS).returncode == 0
        for folder, disk in disks.items():
            expected += add_tars(place, folder or "manifest")
            if folder:
                disk.fill()
            with monkeypatch.context() as patch:
                if not folder:  # a run first writes the fingerprint there
                    refresh = Ledger.refresh
                    patch.setattr(Ledger, "refresh", lambda *given, to=refresh, full=disk: (full.fill(), to(*given)))
                check_failed(place.tag(**KEYS), folder or "manifest")
            assert verify_output(Output(str(output), StoreOptions())).duplicates == 0
            disk.make_space()
            done = place.tag(**KEYS)
            assert done.returncode == 0, (folder, done.stdout + done.stderr)
            assert place.verify().ok, (folder, place.verify().problems)
            assert place.keys_of("data") == expected
            assert len(place.rows("rejects")) == len(expected) // (PER_TAR - 1)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_disk_that_fills_up_in_the_middle_of_a_run(tmp_path: Path) -> None:
    place = Place(str(tmp_path), tmp_path)
    expected = sum((add_tars(place, f"{number}") for number in range(4)), Counter[str]())
    with small_disk(tmp_path / "output", "160k") as disk:
        done = place.tag(**KEYS)
        check_failed(done, "output")
        for size in ("320k", "480k"):
            disk.resize(size)
            done = place.tag(**KEYS)
            print(size, done.returncode, len(list((tmp_path / "output/commits").glob("*"))))
        disk.resize("64m")
        done = place.tag(**KEYS)
        assert done.returncode == 0, done.stdout + done.stderr
        assert place.verify().ok, place.verify().problems
        assert place.keys_of("data") == expected
        assert place.parts() == []
