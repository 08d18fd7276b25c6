"""Listing inputs: what cannot be looked at is counted and named, what tools keep beside the data is skipped."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import JobConfig
from pipelines.inputs.columns import PassedColumns
from pipelines.inputs.rows import Input
from pipelines.output.output import Output
from pipelines.planning.dates import default_dates
from pipelines.planning.known import KnownInputs
from pipelines.planning.listing import InputLister, PlanReport
from pipelines.planning.packing import SegmentWriter
from pipelines.planning.plan import read_plan
from storage.hidden_names import is_hidden
from storage.settings import ConfigError
from storage.store import Entry, Forbidden, Store, StoreError, StoreOptions

DATA = b"not decoded here"
LINKS = "links in a circle or to a folder that is read anyway"


def list_inputs(
    tmp_path: Path, input: str | list[str], known: list[Input] | None = None, **keys: Any
) -> tuple[list[str], PlanReport]:
    """The keys of new inputs, and the report."""
    config = JobConfig(**{"input": input, "output": str(tmp_path / "output"), "labels": ["a"], **keys})
    output, report = Output(str(tmp_path / "known")), PlanReport()
    segment = SegmentWriter(0)
    segment.add(known or [])
    output.store.put(output.uri_of("plan/000000.parquet"), segment.close())
    plan = read_plan(output, config.list_roots())
    lister = InputLister(config, StoreOptions(), plan.known, plan.holds, PassedColumns({}), report)
    return [item.key for item in lister.list_new()], report


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(DATA)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "in", "a.jpg", "z/b.jpg")
    return tmp_path / "in"


HIDDEN = [
    "_temporary/0/a.jpg",
    "day=1/_temporary/a.parquet",
    "_delta_log/a.json",
    "_change_data/a.parquet",
    "_SUCCESS",
    "_started_123",
    ".git/a.jpg",
    ".cache/x/a.jpg",
    ".ipynb_checkpoints/a-checkpoint.jpg",
    ".Trash-1000/files/a.jpg",
    ".hidden.jpg",
    "._a.jpg",
    ".DS_Store",
    ".@__thumb/a.jpg",
    "b/@eaDir/a.jpg/SYNOPHOTO_THUMB_XL.jpg",
    "#recycle/a.jpg",
    "@Recycle/a.jpg",
    "__MACOSX/._a.jpg",
    "__MACOSX/a.jpg",
    "lost+found/a.jpg",
    "$RECYCLE.BIN/a.jpg",
    "System Volume Information/a.jpg",
    "a.b/..c.jpg.d/a.jpg",
]
VISIBLE = [
    "_photos/a.jpg",
    "_a.jpg",
    "_started_on=2024-01-01/_code=3/a.jpg",
    "__a__.jpg",
    "day=1/a.jpg",
    "x=__HIVE_DEFAULT_PARTITION__/a.jpg",
    "temporary/a.jpg",
    "recycle/a.jpg",
    "a/../b.jpg",
    "./a.jpg",
    "//a.jpg",
    "@home/a.jpg",
    "my_temporary/a.jpg",
    "#1.jpg",
]


def test_names_that_are_hidden_and_names_that_are_not() -> None:
    assert [name for name in HIDDEN if not is_hidden(name)] == []
    assert [name for name in VISIBLE if is_hidden(name)] == []


def test_hidden_files_and_folders_are_skipped_and_counted(tmp_path: Path, root: Path) -> None:
    write(root, *HIDDEN)
    found, report = list_inputs(tmp_path, str(root))
    assert found == ["a.jpg", "z/b.jpg"]
    assert report.skipped.counts == {"hidden files": len(HIDDEN)}
    assert len(report.skipped.examples["hidden files"]) == 3


@pytest.mark.parametrize("place", [".cache/images", "_temporary", "@eaDir"])
def test_what_the_user_names_is_read_whatever_its_name(tmp_path: Path, root: Path, place: str) -> None:
    """A configured folder below or above a hidden one, a configured file, and both beside their parent folder."""
    write(root, f"{place}/c.jpg", f"{place}/.d.jpg")
    folder, file = str(root / place), str(root / place / ".d.jpg")
    assert list_inputs(tmp_path, folder)[0] == ["c.jpg"]
    assert list_inputs(tmp_path, file)[0] == [".d.jpg"]
    for inputs in ([str(root), folder, file], [file, folder, str(root)]):
        found, report = list_inputs(tmp_path, inputs)
        assert sorted(Path(key).name for key in found) == [".d.jpg", "a.jpg", "b.jpg", "c.jpg"]
        assert report.skipped.counts == {}


def test_hidden_files_that_are_planned_are_no_trouble(tmp_path: Path, root: Path) -> None:
    write(root, ".git/c.jpg")
    status = (root / ".git/c.jpg").stat()
    planned = Input("image", str(root / ".git/c.jpg"), ".git/c.jpg", status.st_size, "another version")
    found, report = list_inputs(tmp_path, str(root), [planned])
    assert (found, report.waiting) == (["a.jpg", "z/b.jpg"], [])


def test_images_that_are_tagged_again_because_they_changed_are_counted(tmp_path: Path, root: Path) -> None:
    planned = Input("image", str(root / "a.jpg"), "a.jpg", 5, "an earlier version")
    found, report = list_inputs(tmp_path, str(root), [planned], on_changed="retag")
    assert (found, report.changed, report.changed_rows) == (["a.jpg", "z/b.jpg"], 1, 1)
    found, report = list_inputs(tmp_path, str(root), [planned], on_changed="error")
    assert (found, report.changed, [item.reason for item in report.waiting]) == (["z/b.jpg"], 0, ["changed"])


def test_links_in_a_circle_are_counted_and_named(tmp_path: Path, root: Path) -> None:
    (root / "self.jpg").symlink_to(root / "self.jpg")
    (root / "one").symlink_to(root / "two")
    (root / "two").symlink_to(root / "one")
    (root / "z/up").symlink_to(root)
    (root / "y").mkdir()
    (root / "y/to_z").symlink_to(root / "z")
    (root / "z/to_y").symlink_to(root / "y")
    found, report = list_inputs(tmp_path, str(root))
    assert found == ["a.jpg", "z/b.jpg"]
    assert report.waiting == []
    assert report.skipped.counts == {LINKS: 6}
    assert str(root / "one") in report.skipped.examples[LINKS]


def test_a_folder_is_read_once_whatever_links_lead_to_it(tmp_path: Path, root: Path) -> None:
    outside = tmp_path / "outside"
    write(outside, "c.jpg", "below/d.jpg")
    for one in range(6):  # folders that all link to each other: each image is an input once, and not 1,956 times
        write(root, f"mesh{one}/e{one}.jpg")
        for other in range(6):
            (root / f"mesh{one}/to{other}").symlink_to(root / f"mesh{other}")
    (root / "first").symlink_to(outside)
    (root / "second").symlink_to(outside)
    (root / "third").symlink_to(outside / "below")
    (outside / "back").symlink_to(root)
    found, report = list_inputs(tmp_path, str(root))
    mesh = [f"mesh{one}/e{one}.jpg" for one in range(6)]
    assert found == sorted(["a.jpg", "first/below/d.jpg", "first/c.jpg", *mesh, "z/b.jpg"])
    assert report.skipped.counts == {LINKS: 36 + 3}
    # The input itself may be reached through a link.
    (tmp_path / "to_input").symlink_to(root)
    found, _ = list_inputs(tmp_path, str(tmp_path / "to_input"))
    assert found == sorted(["a.jpg", "first/below/d.jpg", "first/c.jpg", *mesh, "z/b.jpg"])


def test_a_link_to_a_folder_above_an_input_is_not_followed(tmp_path: Path, root: Path) -> None:
    """What the folder above holds besides is no input, or another input's."""
    write(tmp_path, "other/c.jpg")
    (root / "z/up").symlink_to("../..")
    (tmp_path / "other/top").symlink_to("/")
    for inputs, expected in (
        ([root], ["a.jpg", "z/b.jpg"]),
        ([root, tmp_path / "other"], ["a.jpg", "c.jpg", "z/b.jpg"]),
        ([root / "z", root], ["a.jpg", "b.jpg"]),
    ):
        found, report = list_inputs(tmp_path, [*map(str, inputs)])
        assert sorted(found) == expected
        assert report.skipped.counts.keys() == {LINKS}


def test_a_folder_that_two_inputs_lead_to_is_read_once(tmp_path: Path, root: Path) -> None:
    """The inputs of days, links between inputs, and links of several inputs to one folder."""
    write(tmp_path, "days/1/c.jpg", "days/2/d.jpg", "shared/e.jpg", "shared/below/f.jpg")
    for day, other in ((1, 2), (2, 1)):
        (tmp_path / f"days/{day}/other").symlink_to(tmp_path / f"days/{other}")
        (tmp_path / f"days/{day}/shared").symlink_to(tmp_path / "shared")
    (root / "days").symlink_to(tmp_path / "days")
    (root / "day").symlink_to(tmp_path / "days/1")
    days = [str(tmp_path / "days/1"), str(tmp_path / "days/2")]
    found, report = list_inputs(tmp_path, days)
    assert sorted(found) == ["c.jpg", "d.jpg", "shared/below/f.jpg", "shared/e.jpg"]
    assert report.skipped.counts == {LINKS: 3}
    # The folder of the days is no input, but both days are.
    found, report = list_inputs(tmp_path, [str(root), *days])
    assert sorted(found) == ["a.jpg", "c.jpg", "d.jpg", "shared/below/f.jpg", "shared/e.jpg", "z/b.jpg"]
    assert report.skipped.counts == {LINKS: 3 + 1 + 2}


@pytest.mark.parametrize("below", [False, True])
def test_a_folder_and_a_link_to_it_are_one_input(tmp_path: Path, root: Path, below: bool) -> None:
    """Also a link to a folder below it, or to a hidden one, which is read because it is configured."""
    write(root, ".hidden/c.jpg")
    (tmp_path / "link").symlink_to(root / "z" if below else root)
    (tmp_path / "seen").symlink_to(root / ".hidden")
    for inputs in ([root, tmp_path / "link"], [tmp_path / "link", root]):
        found, report = list_inputs(tmp_path, [*map(str, inputs)])
        assert sorted(Path(key).name for key in found) == ["a.jpg", "b.jpg"]
        assert report.skipped.counts == {"hidden files": 1}
        found, report = list_inputs(tmp_path, [*map(str, inputs), str(tmp_path / "seen")])
        assert sorted(Path(key).name for key in found) == ["a.jpg", "b.jpg", "c.jpg"]
        assert report.skipped.counts == {}


def plan_files(*paths: Path) -> list[Input]:
    """Plan these files as they are now."""
    return [
        Input("image", str(path), path.name, status.st_size, f"{status.st_size:x}-{status.st_mtime_ns:x}")
        for path in paths
        for status in [path.stat()]
    ]


def test_a_planned_file_stays_the_same_input_when_other_links_lead_to_its_folder(tmp_path: Path, root: Path) -> None:
    outside = tmp_path / "outside"
    write(outside, "c.jpg", "below/d.jpg")
    (root / "linkA").symlink_to(outside)
    planned = plan_files(root / "a.jpg", root / "z/b.jpg", root / "linkA/c.jpg", root / "linkA/below/d.jpg")
    for name, target in (("0link", outside), ("00below", outside / "below")):  # their names sort before
        (root / name).symlink_to(target)
        assert list_inputs(tmp_path, str(root), planned)[0] == []
    # The folder itself becomes an input, by its own name or by that of a link; and a link becomes a folder.
    (tmp_path / "to_outside").symlink_to(outside)
    for inputs in ([root, outside], [outside, root], [tmp_path / "to_outside", root]):
        assert list_inputs(tmp_path, [*map(str, inputs)], planned)[0] == []
    (root / "linkA").unlink()
    outside.rename(root / "linkA")
    assert list_inputs(tmp_path, str(root), planned)[0] == []
    # Another version is noticed under each of its names.
    (root / "linkA/c.jpg").write_bytes(DATA + DATA)
    (root / "0link").unlink()
    (root / "0link").symlink_to(root / "linkA")
    found, report = list_inputs(tmp_path, [str(root / "0link"), str(root)], planned)
    assert (found, [item.reason for item in report.waiting]) == ([], ["changed"])


def test_a_folder_that_the_folders_of_all_days_link_to_is_planned_once(tmp_path: Path) -> None:
    write(tmp_path, "shared/e.jpg", "in/dt=2026-01-01/a.jpg", "in/dt=2026-01-02/b.jpg")
    for day in ("dt=2026-01-01", "dt=2026-01-02"):
        (tmp_path / f"in/{day}/shared").symlink_to(tmp_path / "shared")
    template = str(tmp_path / "in/dt={date}")
    planned = plan_files(tmp_path / "in/dt=2026-01-01/a.jpg", tmp_path / "in/dt=2026-01-01/shared/e.jpg")
    assert list_inputs(tmp_path, template, planned, dates=["2026-01-02"])[0] == ["b.jpg"]


def test_a_link_that_leads_elsewhere_later_brings_other_files(tmp_path: Path, root: Path) -> None:
    write(tmp_path, "one/c.jpg", "two/d.jpg")
    (root / "latest").symlink_to(tmp_path / "one")
    planned = plan_files(root / "a.jpg", root / "z/b.jpg", root / "latest/c.jpg")
    (root / "latest").unlink()
    (root / "latest").symlink_to(tmp_path / "two")
    assert list_inputs(tmp_path, str(root), planned)[0] == ["latest/d.jpg"]


def write_output_files(folder: Path, marker: str = "fingerprint.json") -> None:
    """Write files with the names of an output's files."""
    names = ("labels.parquet", "plan/000000.parquet", "data/000000-000000-0123456789ab.parquet")
    write(folder, *names, "rejects/000000-000012.1-0123456789ab.parquet", marker)


def test_files_of_outputs_are_no_inputs(tmp_path: Path, root: Path) -> None:
    """Outputs of other jobs, the output itself behind a link, and samples. What lies beside such files is an input."""
    write_output_files(root / "tags")
    write(root, "tags/photos/c.jpg", "sample/sample.parquet", "sample/sample.json", "other/sample.parquet")
    write_output_files(root / "no output", "notes.json")
    found, report = list_inputs(tmp_path, str(root))
    assert found == [
        "a.jpg",
        "no output/data/000000-000000-0123456789ab.parquet",
        "no output/labels.parquet",
        "no output/plan/000000.parquet",
        "no output/rejects/000000-000012.1-0123456789ab.parquet",
        "other/sample.parquet",
        "tags/photos/c.jpg",
        "z/b.jpg",
    ]
    assert report.skipped.counts == {".json files": 3, "files of outputs and samples of Sightline": 5}
    # A part of an output that is named itself is read.
    found, _ = list_inputs(tmp_path, str(root / "tags/data"))
    assert found == ["000000-000000-0123456789ab.parquet"]


def test_images_in_the_folder_of_the_output_are_inputs(tmp_path: Path, root: Path) -> None:
    """The input may be the output's folder, or lie in it. Only the output's own files are none."""
    write_output_files(root)
    for folder, expected in ((root, ["a.jpg", "z/b.jpg"]), (root / "z", ["b.jpg"])):
        found, report = list_inputs(tmp_path, str(folder), output=str(root))
        assert (found, report.skipped.counts.keys() - {".json files"}) == (expected, set())


def test_a_change_of_an_image_is_noticed_although_a_list_names_it_too(tmp_path: Path, root: Path) -> None:
    row = Input("uri", str(root / "a.jpg"), "a.jpg", -1, "", metadata='{"caption": "a"}')
    planned = [Input("image", str(root / "a.jpg"), "a.jpg", 5, "an earlier version"), row]
    found, report = list_inputs(tmp_path, str(root), planned)
    assert (found, [item.reason for item in report.waiting]) == (["z/b.jpg"], ["changed"])
    found, report = list_inputs(tmp_path, str(root), planned, on_changed="retag")
    assert (found, report.changed) == (["a.jpg", "z/b.jpg"], 1)
    found, report = list_inputs(tmp_path, str(root), [row], on_changed="retag")  # nothing to compare with
    assert (found, report.changed) == (["z/b.jpg"], 0)


@pytest.mark.parametrize("entry", ["./in/a.jpg", "in/./a.jpg", "x/../in/a.jpg", "file://{root}/a.jpg", "{root}//a.jpg"])
def test_an_image_that_a_list_names_in_another_way_is_one_input(tmp_path: Path, root: Path, entry: str) -> None:
    (tmp_path / "list.txt").write_text(entry.format(root=root) + "\n")
    found, report = list_inputs(tmp_path, [str(root), str(tmp_path / "list.txt")])
    assert len(found) == 2
    assert found[1] == "z/b.jpg"
    planned = [Input("image", str(root / "a.jpg"), "a.jpg", 16, "version")]
    found, report = list_inputs(tmp_path, str(tmp_path / "list.txt"), planned)
    assert (found, report.known) == ([], 1)


def test_a_folder_that_is_empty_now_waits_if_something_was_planned_there(tmp_path: Path, root: Path) -> None:
    """A mount that is missing leaves an empty folder."""
    planned = [Input("image", str(tmp_path / "mount/a.jpg"), "a.jpg", 5, "version")]
    (tmp_path / "mount").mkdir()
    both = [str(root), str(tmp_path / "mount")]
    found, report = list_inputs(tmp_path, both, planned)
    assert (found, [item.reason for item in report.waiting]) == (["a.jpg", "z/b.jpg"], ["missing"])
    assert "mount is empty now" in report.waiting[0].detail
    for known, keys in ((planned, {"on_missing": "reject"}), ([], {})):
        found, report = list_inputs(tmp_path, both, known, **keys)
        assert (len(found), report.waiting) == (2, [])
        assert report.skipped.counts == {"inputs with nothing under them": 1}


def test_special_files_and_odd_names_are_counted_and_named_on_one_line(tmp_path: Path, root: Path) -> None:
    os.mkfifo(root / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "socket.jpg"))
    (root / "gone.jpg").symlink_to(root / "nowhere")
    raw = os.fsencode(root)
    os.mkdir(raw + b"/folder\xff")
    for name in (b"/bad\xff.jpg", b"/folder\xff/a.jpg"):
        Path(os.fsdecode(raw + name)).write_bytes(DATA)
    write(root, "new\nline.txt", "new\nline.jpg")
    found, report = list_inputs(tmp_path, str(root))
    assert found == ["a.jpg", "new\nline.jpg", "z/b.jpg"]
    assert report.skipped.counts == {
        "broken links and special files": 3,
        "names that are not UTF-8": 2,
        ".txt files": 1,
    }
    for names in report.skipped.examples.values():
        assert all(name.encode() and "\n" not in name for name in names)


def test_a_path_that_is_too_long_is_counted_and_named(tmp_path: Path, root: Path) -> None:
    """Linux opens paths of up to 4,095 bytes. Deeper folders are made by relative paths."""
    before = os.getcwd()
    os.chdir(root)
    for _ in range(20):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    os.chdir(before)
    found, report = list_inputs(tmp_path, str(root))
    assert found == ["a.jpg", "z/b.jpg"]
    assert report.skipped.counts == {"paths that are too long": 1}


@pytest.fixture
def close(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make calls of the system fail for some paths: a test that runs as root may look at every folder."""

    def close(calls: tuple[str, ...], fails: Callable[[str], bool], number: int = errno.EACCES) -> None:
        for name in calls:
            real = getattr(os, name)

            def call(path: Any, *rest: Any, real: Any = real, **more: Any) -> Any:
                if isinstance(path, str) and fails(path):
                    raise OSError(number, os.strerror(number), path)
                return real(path, *rest, **more)

            monkeypatch.setattr(f"storage.local.os.{name}", call)

    return close


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.EACCES, "forbidden"), (errno.EIO, "unreachable"), (errno.ESTALE, "unreachable")]
)
def test_a_folder_that_cannot_be_entered_waits_and_the_rest_is_done(
    tmp_path: Path, root: Path, close: Callable[..., None], number: int, reason: str
) -> None:
    write(root, "closed/c.jpg", "lost+found/d.jpg")
    close(("listdir",), lambda path: path.endswith(("/closed", "/lost+found")), number)
    found, report = list_inputs(tmp_path, str(root))
    assert found == ["a.jpg", "z/b.jpg"]
    [waiting] = report.waiting
    assert (waiting.name, waiting.reason) == (str(root / "closed"), reason)
    assert os.strerror(number) in waiting.detail
    assert report.skipped.counts == {"hidden files": 1}


def test_a_folder_whose_names_may_be_read_but_not_looked_at_waits_once(
    tmp_path: Path, root: Path, close: Callable[..., None]
) -> None:
    """Permission to read a folder but not to search it: each stat of a file in it fails."""
    write(root, *(f"closed/{number}.jpg" for number in range(9)))
    close(("stat", "lstat"), lambda path: "/closed/" in path)
    found, report = list_inputs(tmp_path, str(root))
    assert found == ["a.jpg", "z/b.jpg"]
    assert [item.name for item in report.waiting] == [str(root / "closed")]


def test_a_link_into_a_closed_folder_waits_alone(tmp_path: Path, root: Path, close: Callable[..., None]) -> None:
    (root / "link.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    close(("stat",), lambda path: path.endswith("link.jpg"))
    found, report = list_inputs(tmp_path, str(root))
    assert found == ["a.jpg", "z/b.jpg"]
    assert [(item.name, item.reason) for item in report.waiting] == [(str(root / "link.jpg"), "forbidden")]


def test_a_folder_that_is_removed_while_it_is_listed_is_no_trouble(
    tmp_path: Path, root: Path, close: Callable[..., None]
) -> None:
    write(root, "removed/c.jpg")
    close(("listdir",), lambda path: path.endswith("/removed"), errno.ENOENT)
    found, report = list_inputs(tmp_path, str(root))
    assert (found, report.waiting) == (["a.jpg", "z/b.jpg"], [])


def test_a_configured_input_that_cannot_be_read_is_an_error(
    tmp_path: Path, root: Path, close: Callable[..., None]
) -> None:
    (tmp_path / "self").symlink_to(tmp_path / "self")
    with pytest.raises(StoreError, match="symbolic links"):
        list_inputs(tmp_path, [str(root), str(tmp_path / "self")])
    with pytest.raises(ConfigError, match="does not exist"):
        list_inputs(tmp_path, str(tmp_path / "nowhere"))
    close(("listdir",), lambda path: path == str(root))
    with pytest.raises(Forbidden):
        list_inputs(tmp_path, str(root))


class Objects:
    """A store of one listing."""

    def __init__(self, *keys: str) -> None:
        self._keys = keys

    def stat(self, uri: str) -> None:
        return None

    def list(self, prefix: str, unreadable: object = None, links: object = None) -> list[Entry]:
        return [Entry(f"s3://bucket/{key}", 9, "etag") for key in self._keys]


def test_hidden_names_in_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefix itself is not looked at."""
    store: Store = Objects(*(f".in/_temporary/{name}" for name in [*HIDDEN, *VISIBLE]))  # type: ignore[assignment]
    monkeypatch.setattr("pipelines.planning.listing.open_store", lambda uri, options: store)
    found, report = list_inputs(tmp_path, "s3://bucket/.in/_temporary")
    assert found == VISIBLE
    assert report.skipped.counts == {"hidden files": len(HIDDEN)}


@pytest.mark.parametrize("empty", [False, True])
def test_dated_inputs_wait_while_the_folder_of_all_days_is_away(tmp_path: Path, root: Path, empty: bool) -> None:
    """These days are not listed again later, so a mount that is missing must not look like days without images."""
    template, planned = str(tmp_path / "mount/in/dt={date}"), str(tmp_path / "mount/in/dt=2025-12-31/a.jpg")
    known = [Input("image", planned, "a.jpg", 5, "version")]
    if empty:
        (tmp_path / "mount/in").mkdir(parents=True)
    what = "is empty now" if empty else "does not exist now"
    for days in (["2026-01-01", "2026-01-02"], ["2025-12-31"]):
        found, report = list_inputs(tmp_path, [template, str(root), f"{template}/b"], known, dates=days)
        assert found == ["a.jpg", "z/b.jpg"]
        told = [(item.reason, item.detail) for item in report.waiting]
        assert told == [("missing", f"input: {tmp_path}/mount/in {what}")]
        assert report.skipped.counts == {}
        found, report = list_inputs(tmp_path, [template, str(root)], known, dates=days, on_missing="reject")
        assert (len(found), report.waiting) == (2, [])
        assert report.skipped.counts == {"inputs that do not exist": len(days)}
    # A day without a folder is none of this.
    write(tmp_path / "mount/in", "dt=2026-01-03/c.jpg")
    found, report = list_inputs(tmp_path, template, known, dates=["2026-01-02", "2026-01-03"])
    assert (found, report.waiting) == (["c.jpg"], [])


def test_dated_inputs_in_a_folder_that_never_existed_are_refused(tmp_path: Path) -> None:
    for known in ([], [Input("image", str(tmp_path / "other/a.jpg"), "a.jpg", 5, "version")]):
        with pytest.raises(ConfigError, match=r"input: .*/nowhere does not exist"):
            list_inputs(tmp_path, str(tmp_path / "nowhere/dt={date}"), known)


def test_dated_lists_wait_while_their_folder_is_away(tmp_path: Path) -> None:
    known = [Input("uri", str(tmp_path / "a.jpg"), "a.jpg", -1, "")]
    found, report = list_inputs(tmp_path, str(tmp_path / "lists/{date}.csv"), known)
    assert (found, [item.detail for item in report.waiting]) == ([], [f"input: {tmp_path}/lists does not exist now"])


def test_dated_inputs_are_the_folders_of_the_days(tmp_path: Path) -> None:
    """A day without a folder is no error, and is told. What else does not exist still is one."""
    write(tmp_path / "in", "dt=2026-01-01/a.jpg", "dt=2026-01-02/b.jpg", "dt=2026-01-03/c.jpg")
    template = str(tmp_path / "in/dt={date}")
    found, _ = list_inputs(tmp_path, template, dates=["2026-01-01", "2026-01-03"])
    assert found == ["a.jpg", "c.jpg"]
    found, report = list_inputs(tmp_path, template, dates=["2026-01-02", "2026-01-09"])
    assert found == ["b.jpg"]
    assert report.skipped.counts == {"inputs that do not exist": 1}
    today, yesterday = (default_dates(datetime.now(UTC))[number].isoformat() for number in (1, 0))
    write(tmp_path / "in", f"dt={today}/today.jpg", f"dt={yesterday}/yesterday.jpg")
    assert sorted(list_inputs(tmp_path, template)[0]) == ["today.jpg", "yesterday.jpg"]
    with pytest.raises(ConfigError, match="does not exist"):
        list_inputs(tmp_path, [template, str(tmp_path / "nowhere")], dates=["2026-01-01"])


@pytest.mark.parametrize("day", ["2026-01-01", date(2026, 1, 1), ["2026-01-01"]])
def test_one_day_need_not_be_a_list(tmp_path: Path, day: Any) -> None:
    write(tmp_path / "in", "dt=2026-01-01/a.jpg", "dt=2026-01-02/b.jpg")
    assert list_inputs(tmp_path, str(tmp_path / "in/dt={date}"), dates=day)[0] == ["a.jpg"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"input": "in", "dates": ["2026-01-01"]}, "no input has {date}"),
        ({"input": "in/{date}", "dates": []}, "at least one day"),
        ({"input": "in/{date}", "dates": ["2026-13-01"]}, "dates"),
        ({"input": "in/{date:%H}"}, "has the directive %H"),
    ],
)
def test_mistakes_in_dates_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JobConfig(**{"output": "out", "labels": ["a"], **keys})


def test_an_input_that_is_given_twice_is_planned_once(tmp_path: Path, root: Path) -> None:
    """Also in two spellings: a prefix of an object store may end with a slash."""
    assert list_inputs(tmp_path, [str(root), str(root)])[0] == ["a.jpg", "z/b.jpg"]
    found, _ = list_inputs(tmp_path, [str(root), f"{root}/z/../z", f"{root}/a.jpg"])
    assert sorted(found) == ["a.jpg", "z/b.jpg"]


def test_a_prefix_in_two_spellings_is_planned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store: Store = Objects("in/a.jpg", "in/b.jpg")  # type: ignore[assignment]
    monkeypatch.setattr("pipelines.planning.listing.open_store", lambda uri, options: store)
    assert list_inputs(tmp_path, ["s3://bucket/in", "s3://bucket/in/"])[0] == ["a.jpg", "b.jpg"]


def test_a_changed_file_that_is_hidden_now_is_counted_once(tmp_path: Path, root: Path) -> None:
    write(root, ".git/c.jpg")
    known = [Input("image", str(root / ".git/c.jpg"), ".git/c.jpg", 1, "another")]
    found, report = list_inputs(tmp_path, str(root), known)
    assert (found, report.waiting) == (["a.jpg", "z/b.jpg"], [])
    assert report.skipped.counts == {"hidden files": 1}


def test_long_texts_of_a_list_are_compared_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    meet = KnownInputs.meet

    def record(known: KnownInputs, rows: list[Input]) -> Any:
        sizes.append(len(rows))
        return meet(known, rows)

    monkeypatch.setattr(KnownInputs, "meet", record)
    monkeypatch.setattr("pipelines.planning.listing._BATCH_CHARS", 1000)
    rows = "".join(f"/nowhere/{number}.jpg,{'x' * 400}\n" for number in range(7))
    (tmp_path / "list.csv").write_text(f"uri,caption\n{rows}")
    assert len(list_inputs(tmp_path, str(tmp_path / "list.csv"))[0]) == 7
    assert sizes == [3, 3, 1]
