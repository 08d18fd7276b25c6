"""The same job over the same images on a disk, in S3, in Google's store and in Azure's gives the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sightline import open_output
from storage.store import join
from tests.support.jobs import Place, make_image
from tests.support.stores.azurite import Azurite
from tests.support.stores.google_server import GoogleServer
from tests.support.stores.radosgw import Radosgw
from tests.support.tars import make_tar

pytestmark = [pytest.mark.azure, pytest.mark.usefixtures("local_ray")]

FILES: dict[str, bytes] = {
    "a folder/with space %25 #1.jpg": make_image(1),
    "umlaut \u00fc.png": make_image(2),
    "broken.jpg": b"\xff\xd8 no image",
    "some.tar": make_tar((f"{number}.jpg", make_image(number)) for number in range(3, 9)),
}
SERVERS = {"s3": "s3", "gs": "google", "az": "azurite"}


def tag_twice(root: str, folder: Path) -> list[dict[str, Any]]:
    """Tag the files, and again with one more. Return the rows without what names the place or the time."""
    folder.mkdir()
    place = Place(root, folder)
    for name, data in FILES.items():
        place.put(name, data)
    for new in (False, True):
        if new:
            place.put("later.jpg", make_image(20))
        done = place.tag(thumbnails=True)
        assert done.returncode == 0, done.stderr
    report = place.verify()
    assert (report.ok, report.problems, report.orphans) == (True, [], 0)
    assert (report.rows_tagged, report.rows_rejected) == (9, 1)
    output = open_output(place.output)
    assert output.to_arrow(["key"]).num_rows == 9
    rows = [row for kind in ("data", "rejects") for row in place.rows(kind)]
    for row in rows:
        assert row.pop("source").startswith(join(root, "input"))
    return sorted(rows, key=lambda row: str(row["key"]))


@pytest.mark.parametrize("scheme", [pytest.param("s3", marks=pytest.mark.s3), "gs", "az"])
def test_rows_are_those_of_a_disk(
    scheme: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: Radosgw | GoogleServer | Azurite = request.getfixturevalue(SERVERS[scheme])
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    there = tag_twice(f"{scheme}://{server.new_bucket()}/root", tmp_path / "job")
    here = tag_twice(str(tmp_path / "root"), tmp_path / "other")
    assert [row.keys() for row in there] == [row.keys() for row in here]
    for one, other in zip(there, here, strict=True):
        changed = {name for name in one if one[name] != other[name] and not name.endswith("_at")}
        assert changed <= {"shard", "row"}, "only the order of a listing may differ"
