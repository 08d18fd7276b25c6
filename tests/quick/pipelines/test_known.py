"""The planned inputs as arrays of hashes give the same answers as plain dictionaries."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.inputs.rows import Input
from pipelines.planning.known import CHANGED, KNOWN, NAMED, NEW, PLAN_COLUMNS, KnownInputs
from pipelines.planning.packing import SegmentWriter
from storage.store import Entry

LOCAL = {
    "/a/b.jpg": ["/a/b.jpg", "/a/./b.jpg", "/a/c/../b.jpg", "file:///a/b.jpg", "/a//b.jpg", "file:///a/c/.././b.jpg"],
    "/a/.b.jpg": ["/a/.b.jpg", "/a/./.b.jpg", "file:///a/.b.jpg"],
    "/a/b..jpg": ["/a/b..jpg", "/a/c/../b..jpg"],
    "/ü ~%20#.jpg": ["/ü ~%20#.jpg", "/./ü ~%20#.jpg", "file:///ü ~%20#.jpg"],
}
"""Names of files, each with spellings of it. No folder `/a` is there, so that no link is followed."""
REMOTE = ["s3://bucket/a/b.jpg", "s3://bucket/a/./b.jpg", "s3://bucket/a/c/../b.jpg", "s3://bucket/a//b.jpg"]
"""Names of different objects."""
NAMES = {spelling: name for name, spellings in LOCAL.items() for spelling in spellings} | {one: one for one in REMOTE}
COLUMNS = [None, "{}", '{"id": 1}', '{"id": 2}', '{"id": 1, "x": null}']


def image(uri: str, etag: str = "e", size: int = 9) -> Input:
    return Input("image", uri, "key", size, etag)


def row(uri: str, metadata: str | None = None) -> Input:
    return Input("uri", uri, "key", -1, "", metadata=metadata)


def plan_file(inputs: list[Input]) -> pa.Table:
    segment = SegmentWriter(0)
    segment.add(inputs)
    return pq.read_table(io.BytesIO(segment.close()), columns=list(PLAN_COLUMNS))


def known(*inputs: Input) -> KnownInputs:
    found = KnownInputs()
    found.add(plan_file([*inputs]))
    return found


@dataclass
class Model:
    """What `KnownInputs` says of itself, with dictionaries."""

    objects: dict[str, set[str]] = field(default_factory=dict)
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    plain: Counter[str] = field(default_factory=Counter)
    named: set[str] = field(default_factory=set)
    met: set[str] = field(default_factory=set)

    def add(self, inputs: list[Input]) -> None:
        for planned in inputs:
            if planned.kind == "uri":
                self.rows[NAMES[planned.uri], planned.version] += 1
                self.named.add(NAMES[planned.uri])
            else:
                self.objects.setdefault(NAMES[planned.uri], set()).add(planned.version)

    def find(self, entry: Entry) -> int:
        name = NAMES[entry.uri]
        if name in self.objects:
            return KNOWN if f"{entry.size} {entry.etag}" in self.objects[name] else CHANGED
        return KNOWN if name in self.named else NAMED if name in self.met else NEW

    def meet(self, met: Input) -> bool:
        name = NAMES[met.uri]
        self.met.add(name)
        self.seen[name, met.version] += 1
        if self.seen[name, met.version] <= self.rows[name, met.version]:
            return True
        if met.version or name not in self.objects:
            return False
        self.plain[name] += 1
        return self.plain[name] == 1


def draw_inputs(rng: random.Random, most: int) -> list[Input]:
    found: list[Input] = []
    for _ in range(rng.randrange(most)):
        uri = rng.choice([*NAMES])
        kind = rng.choice(["image", "parquet", "uri", "uri"])
        if kind == "uri":
            found += [row(uri, rng.choice(COLUMNS))] * rng.choice([1, 1, 2, 3])
        elif kind == "image":
            found.append(image(uri, rng.choice("ef"), rng.choice([8, 9])))
        else:
            etag = rng.choice("ef")
            found += [Input("parquet", uri, "key", 9, etag, part, part + 1) for part in range(rng.randrange(1, 4))]
    return found


@pytest.mark.parametrize("seed", range(60))
def test_the_same_answers_as_dictionaries(seed: int) -> None:
    rng = random.Random(seed)
    found, model = KnownInputs(), Model()
    for _ in range(rng.randrange(4)):
        inputs = draw_inputs(rng, rng.choice([1, 4, 30]))
        found.add(plan_file(inputs))
        model.add(inputs)
    for _ in range(6):
        if rng.random() < 0.5:
            entries = [Entry(rng.choice([*NAMES]), rng.choice([8, 9]), rng.choice("ef")) for _ in range(20)]
            assert found.find(entries).tolist() == [model.find(entry) for entry in entries]
        else:
            met = [row(rng.choice([*NAMES]), rng.choice(COLUMNS)) for _ in range(rng.choice([0, 1, 25]))]
            assert found.meet(met).tolist() == [model.meet(one) for one in met]


def test_nothing_is_planned_at_first() -> None:
    empty = KnownInputs()
    assert not empty
    assert empty.find([Entry("/a", 1, "e")]).tolist() == [NEW]
    assert empty.find([]).tolist() == []
    assert empty.meet([row("/a"), row("/a")]).tolist() == [False, False]
    assert known(image("/a"))
    assert known(row("/a"))


def test_an_object_with_several_versions_is_known_in_each() -> None:
    found = known(image("/a", "e"), image("/a", "f"), image("/b", "e"))
    entries = [Entry("/a", 9, "e"), Entry("/a", 9, "f"), Entry("/a", 9, "g"), Entry("/a", 8, "e"), Entry("/b", 9, "f")]
    assert found.find(entries).tolist() == [KNOWN, KNOWN, CHANGED, CHANGED, CHANGED]


def test_as_many_equal_rows_are_known_as_were_planned() -> None:
    found = known(row("/a", '{"id": 1}'), row("/a", '{"id": 1}'), row("/a"))
    one, plain = row("/a", '{"id": 1}'), row("/a")
    assert found.meet([one, plain]).tolist() == [True, True]
    assert found.meet([one, one, plain]).tolist() == [True, False, False]


def test_a_row_without_columns_is_known_once_if_the_object_is_planned() -> None:
    found = known(image("/a"))
    assert found.meet([row("/a"), row("/a", '{"id": 1}'), row("/a")]).tolist() == [True, False, False]
    assert found.meet([row("/a")]).tolist() == [False]


def test_an_object_that_a_list_names_is_not_new() -> None:
    found = known(row("/planned"))
    assert found.find([Entry("/planned", 9, "e"), Entry("/met", 9, "e")]).tolist() == [KNOWN, NEW]
    found.meet([row("/./met")])
    assert found.find([Entry("/met", 9, "e"), Entry("/other", 9, "e")]).tolist() == [NAMED, NEW]
    found.meet([row("/planned")])
    assert found.find([Entry("/planned", 9, "e")]).tolist() == [KNOWN]


def test_names_that_are_not_utf_8_are_new() -> None:
    """A disk may have them. They are no inputs, which the listing finds out later."""
    found = known(image("/a"))
    assert found.find(
        [Entry("/\udcff/../a", 9, "e"), Entry("/\udcff", 9, "e"), Entry("s3://b/\udcff", 9, "e")]
    ).tolist() == [
        KNOWN,
        NEW,
        NEW,
    ]
    assert found.meet([row("/\udcff"), row("file:///\udcff")]).tolist() == [False, False]


@pytest.mark.parametrize(
    "uri",
    [
        "",
        " ",
        "file://",
        "file:// ",
        "/",
        "//",
        "/.",
        "/..",
        "/../..",
        "~/../a",
        "S3://b/a//b",
        "http://h/a/../b",
        "a/../b",
        "/a\n/../b",
    ],
)
def test_odd_uris_are_compared_too(uri: str) -> None:
    found = known(row(uri))
    assert found.meet([row(uri), row(uri)]).tolist() == [True, False]
    assert found.find([Entry(uri, 9, "e")]).tolist() == [KNOWN]


@pytest.mark.parametrize("name", ["/b\0/../a", "/a\0", "/b\ud800/../a", "/a\ud800//b"])
def test_a_name_that_no_file_can_have_is_new(name: str) -> None:
    assert known(row("/a")).meet([row(name)]).tolist() == [False]


def test_links_before_dots_are_followed(tmp_path: Path) -> None:
    (tmp_path / "far/below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/below")
    found = known(image(str(tmp_path / "far/a.jpg")))
    met = found.meet([row(f"{tmp_path}/link/../a.jpg"), row(f"{tmp_path}/a.jpg")])
    assert met.tolist() == [True, False]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ('{"id": 1, "x": "a"}', '{"x": "a", "id": 1}', True),
        ('{"id": 1.0}', '{"id": 1}', True),
        ('{" id ": 1}', '{"id": 1}', True),
        ('{"": 7, "id": 1}', '{"": 8, "id": 1}', True),
        ('{"": 7}', None, True),
        ('{"id": 1}', '{"id": "1"}', False),
        ('{"id": null}', "{}", False),
        ("not json", "not json", True),
        ("not json", "not  json", False),
    ],
)
def test_rows_are_equal_if_their_columns_are(one: str, other: str | None, same: bool) -> None:
    assert known(row("/a", one)).meet([row("/a", other)]).tolist() == [same]


def test_many_inputs_are_found_again() -> None:
    rng = random.Random(1)
    inputs = [image(f"s3://b/{number}", str(number % 7)) for number in range(20_000)]
    inputs += [row(f"s3://l/{number % 5000}", json.dumps({"id": number % 3})) for number in range(10_000)]
    rng.shuffle(inputs)
    found = KnownInputs()
    for start in range(0, len(inputs), 7_000):
        found.add(plan_file(inputs[start : start + 7_000]))
    entries = [Entry(f"s3://b/{number}", 9, str(number % 8)) for number in range(20_005)]
    expected = [NEW if n >= 20_000 else KNOWN if n % 7 == n % 8 else CHANGED for n in range(20_005)]
    assert found.find(entries).tolist() == expected
    rows = [one for one in inputs if one.kind == "uri"]
    assert found.meet(rows).all()
    assert not found.meet(rows).any()
