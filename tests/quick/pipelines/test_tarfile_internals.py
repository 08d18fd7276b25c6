"""The undocumented attribute of Python's `tarfile` that `pipelines.inputs.tar` uses."""

from __future__ import annotations

import io
import tarfile

from tests.support.jobs import make_tar


def test_a_tar_file_keeps_its_members_in_a_list() -> None:
    """The reader empties this list, because it would grow with the tar."""
    with tarfile.open(fileobj=io.BytesIO(make_tar([("a", b""), ("b", b"")])), mode="r:") as tar:
        first = tar.next()
        assert getattr(tar, "members", None) == [first], (
            "TarFile.members is gone or holds something else: see pipelines/inputs/tar.py"
        )
        tar.members = []  # type: ignore[attr-defined]
        second = tar.next()
        assert second is not None
        assert (second.name, tar.next()) == ("b", None), "TarFile.next needs the earlier members"
