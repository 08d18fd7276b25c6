"""The folder of a running endpoint's files, and what is left of one after its process was killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from serve.rayserve.folders import PREFIX, make_folder, remove_stale

HOLD = """
import sys
from pathlib import Path
from serve.rayserve.folders import make_folder
with make_folder(Path(sys.argv[1])) as folder:
    (folder / "admin.sock").touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_the_folder_of_a_killed_process_is_removed_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}other").mkdir()  # of another program: it has no lock
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        remove_stale(tmp_path)
        assert (left / "admin.sock").exists(), "its process runs"
        process.kill()
    assert left.exists()
    with make_folder(tmp_path) as folder:
        assert not left.exists()
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.name for path in tmp_path.iterdir()} == {f"{PREFIX}other", f"{PREFIX}link", folder.name}
    assert not folder.exists()
