"""Labels from files and from YAML: a label is the text that stands there, or the file is refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipelines.config import JobConfig, load_config
from serve.config import load_endpoint
from serve.routes.huggingface import HuggingFaceParameters
from serve.schemas import LabelQuery
from sightline.commands.curation.quality import write_labels
from sightline.commands.labels import read_labels
from siglip.families import siglip, siglip2
from siglip.label_files import SET_KEYS, read_label_file
from siglip.labels import LabelError, LabelSet
from storage.settings import ConfigError, override_key, parse_override

WORDS = """
no yes on off NO y True false null ~ Null 1.10 1.0 017 0o17 0x1F 0b11 1e3 1.5e3 -1 +1 12:30 190:20:30 2024-01-01
2024-01-01T10:00:00Z .inf -.Inf .nan 1_000 = << C# U.S. 3D 007 00 1,000
""".split()  # noqa: SIM905
"""Plain words of YAML 1.1 that PyYAML makes other values of, and some that it leaves."""


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_plain_words_of_yaml_stay_the_text_that_stands_there(tmp_path: Path) -> None:
    """In a job, an endpoint, a label file and on the command line; in names, prompts, groups and names of sets."""
    lines = "\n".join(f"- {word}" for word in WORDS)
    assert read_labels(write(tmp_path / "a.yaml", lines)).label_names() == WORDS
    inline = ", ".join(word for word in WORDS if "," not in word)
    job = write(tmp_path / "job.yaml", f"input: /i\noutput: /o\nlabels: [{inline}]\nthumbnails: yes\n")
    config = load_config(job)
    assert config.labels.label_names() == [word for word in WORDS if "," not in word]
    assert config.thumbnails == 256
    endpoint = write(tmp_path / "endpoint.yaml", f"label_sets: {{no: [{inline}], 017: {{names: [1.10]}}}}\n")
    sets = load_endpoint(endpoint).label_sets
    assert list(sets) == ["no", "017"]
    assert sets["017"].label_names() == ["1.10"]
    raw: dict[str, Any] = {"input": "/i", "output": "/o"}
    override_key(raw, *parse_override("labels=[no, 1.10]", JobConfig), JobConfig)
    override_key(raw, *parse_override("labels.top_k=null", JobConfig), JobConfig)
    override_key(raw, *parse_override("labels.threshold=1e-1", JobConfig), JobConfig)
    labels = JobConfig(**raw).labels
    assert (labels.label_names(), labels.top_k, labels.threshold) == (["no", "1.10"], None, 0.1)
    assert parse_override("actors.max=4", JobConfig) == ("actors.max", 4)


def test_every_text_of_a_label_set_stays_and_its_numbers_are_numbers(tmp_path: Path) -> None:
    labels = read_labels(
        write(
            tmp_path / "a.yaml",
            "names:\n- {name: 1.10, prompts: [1.10, 12:30], threshold: 0.5, accept: ~}\n- name: no\n  threshold:\n"
            "templates: ['{}', \"{label}!\"]\ntop_k: 3\nthreshold: 1e-3\ngroups: {017: [1.10, no]}\n",
        )
    )
    assert labels.label_names() == ["1.10", "no"]
    assert labels.names[0].prompts == ("1.10", "12:30")
    assert labels.thresholds() == [0.5, 0.001]
    assert labels.accepts() == [None, None]
    assert labels.groups == {"017": ("1.10", "no")}
    assert labels.top_k == 3


def test_merge_keys_and_anchors_still_work(tmp_path: Path) -> None:
    text = "names: [&a {name: no, threshold: 0.5}, {<<: *a, name: yes}, '<<']\n"
    labels = read_labels(write(tmp_path / "a.yaml", text))
    assert labels.label_names() == ["no", "yes", "<<"]
    assert labels.thresholds() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- !!binary aGVsbG8=\n", "the tag !!binary is not read"),
        ("- !!int 017\n", "the tag !!int is not read"),
        ("- !important\n", "the tag !important is not read"),
        ("- !!python/name:os.system\n", "is not read"),
        ("!!set {a, b}\n", "the tag !!set is not read"),
        ("names: [a]\nnames: [b]\n", "the key names stands twice"),
        ("- #hashtag\n", "text after # is a comment in YAML"),
        ("- [a, b]\n", "is not text"),
        ("- a: b\n", "label {'a': 'b'} has no name"),
        ("- \n- b\n", "an empty label"),
        ("names:\n  person: 0\n  car: 1\n", "names is a mapping: write a list"),
        ("a: 0\nb: 1\n", "write the names as a list"),
        ("categories:\n- {id: 1, name: person}\n", "write the names of its categories"),
        ("just text\n", "neither a list of labels nor a label set"),
        ("- a\n---\n- b\n", "expected a single document"),
        ("- *cat\n", "undefined alias"),
        ("- @cat\n", "cannot start any token"),
        ("path: coco\nnames: {0: person}\nnc: 1\n", "leave only names"),
    ],
)
def test_yaml_that_is_no_certain_label_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        read_labels(write(tmp_path / "a.yaml", text))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        ("a.txt", "\ufeffcat\r\ndog\r\n", ["cat", "dog"]),
        ("a.txt", "cat\rdog", ["cat", "dog"]),
        ("a.txt", "# classes\n#\ncat  \n\n  dog\nC#\n3D printer\n", ["cat", "dog", "C#", "3D printer"]),
        ("a.txt", "no\n1.10\n017\nnull\n", ["no", "1.10", "017", "null"]),
        ("coco.names", "person\ntraffic light\n", ["person", "traffic light"]),
        ("labels", "0\n1\n2\n3.14\n4\n", ["0", "1", "2", "3.14", "4"]),
        ("a.txt", "great white shark, white shark\nhammerhead, hammerhead shark\nhen\n", None),
        ("a.yaml", "\ufeff- cat\n- dog\n", ["cat", "dog"]),
        ("a.yaml", "{0: person, 1: bicycle, 10: boat, 2: car}", ["person", "bicycle", "car", "boat"]),
        ("a.yaml", "names:\n  0: person\n  1: no\n", ["person", "no"]),
        ("a.json", '\ufeff["cat", 1.10, 017]'.replace("017", "17"), ["cat", "1.10", "17"]),
        ("a.json", '{"0": "tench", "1": "goldfish", "10": "brambling", "2": "shark"}', None),
        ("a.json", '{"names": ["a", {"name": "b", "threshold": 0.5}], "top_k": null}', ["a", "b"]),
        ("a.json", '["caf\\u00e9", "\\ud83d\\ude00 face"]', ["café", "😀 face"]),
        ("a.csv", '\ufefflabel\ncat\n"dog, big"\nno\n', ["cat", "dog, big", "no"]),
        ("a.csv", "id,name\r\n0,cat\r\n1,dog\r\n", ["cat", "dog"]),
        ("a.csv", ",Label\n0,cat\n1,dog\n", ["cat", "dog"]),
        ("a.tsv", "index\tname\n0\tcat\n1\tdog\n", ["cat", "dog"]),
    ],
)
def test_files_are_read_as_what_they_are(name: str, content: str, names: list[str] | None, tmp_path: Path) -> None:
    found = read_labels(write(tmp_path / name, content)).label_names()
    if names is None:
        lines = list(json.loads(content).values()) if name.endswith("json") else content.splitlines()
        names = [lines[0], lines[1], lines[3], lines[2]] if len(lines) == 4 else lines
    assert found == names


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "cat\n".encode("utf-16"), "it is UTF-16: save it as UTF-8"),
        ("a.txt", "cat\ndog\n".encode("utf-16-le"), "line 1 contains the control character U+0000"),
        ("a.txt", b"cat\ncaf\xe9\n", "line 2 is not UTF-8"),
        ("a.txt", "cat\u2028dog\n", "line 1 contains the control character U+2028"),
        ("a.txt", "cat\vdog\n", "line 1 contains the control character U+000B"),
        ("a.txt", "cat\n#dog\n", "a label that begins with # goes into a YAML file"),
        ("a.txt", "0: tench\n1: goldfish\n", "begin with numbers"),
        ("a.txt", "1 person\n2 bicycle\n13 stop sign\n", "begin with numbers"),
        ("a.txt", "0\tperson\n1\tcar\n", "line 1 contains a tab"),
        ("a.txt", "0,person\n1,car\n", "begin with numbers"),
        ("a.txt", "n01440764 tench\nn01443537 goldfish\n", "WordNet"),
        ("a.txt", "{0: 'tench, Tinca tinca',\n 1: 'goldfish'}\n", "begins like JSON"),
        ("a.txt", '["cat", "dog"]\n', "begins like JSON"),
        ("a.txt", "- cat\n- dog\n", "begins with a dash"),
        ("a.txt", '"cat"\n"dog"\n', "in quotes"),
        ("a.txt", "cat,\ndog,\nbird\n", "end with a comma"),
        ("a.txt", "cat, dog, bird\n", "its only line contains commas"),
        ("a.txt", "cat\n".encode("utf-32"), "it is UTF-32"),
        ("a.txt", "cat\n".encode("utf-32-be").join([b"\0\0\xfe\xff", b""]), "it is UTF-32"),
        ("a.txt", "\n# nothing\n", "neither a list of labels"),
        ("a.pbtxt", "item { name: 'cat' }\n", "must end in"),
        ("a.jsonl", '{"name": "cat"}\n', "must end in"),
        ("a.json", '["a", true]', "True is not text"),
        ("a.json", '["a", null]', "None is not text"),
        ("a.json", '["a", NaN]', "NaN is no label"),
        ("a.json", '{"names": ["a"], "names": ["b"]}', "the key names stands twice"),
        ("a.json", '{"0": ["n01440764", "tench"]}', "write only the label"),
        ("a.json", '{"tench": 0, "goldfish": 1}', "write the names as a list"),
        ("a.json", '{"categories": [{"id": 1, "name": "person"}]}', "COCO"),
        ("a.json", '"cat"', "neither a list"),
        ("a.json", '["cat"', "Expecting"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.yaml", "[" * 2_000, "nested too deeply"),
        ("a.yaml", "&a [*a]", "is not text"),
        ("a.yaml", "- cat\n- dog\u2028\n", "line 2 contains the control character U+2028"),
        ("a.csv", "cat\ndog\n", "exactly one column must be called label or name"),
        ("a.csv", "label,name\n0,cat\n", "exactly one column"),
        ("a.csv", "/m/011k07,Tortoise\n/m/011q46kg,Container\n", "exactly one column"),
        ("a.csv", "name,threshold\ncat,0.5\n", "the column 'threshold' cannot be read"),
        ("a.csv", "id,name\n0,tench, Tinca\n", "line 2 has 3 fields"),
        ("a.csv", "id,name\n0,\n", "line 2 has no label"),
        ("a.csv", 'name\n"cat\ndog\n', "unexpected end of data"),
        ("a.csv", "name\ncat\ncat\n", "listed twice"),
        ("a.csv", "id;name\n0;cat\n", "separated by"),
    ],
)
def test_a_file_whose_labels_are_not_certain_is_refused(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ConfigError) as refused:
        read_labels(path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["cat, " * 100, "a" * 5000, "nowhere.txt", "/"])
def test_a_text_in_place_of_a_list_is_a_file_that_does_not_exist(text: str, tmp_path: Path) -> None:
    message = "is a folder" if text == "/" else "does not exist"
    job = write(tmp_path / "job.yaml", yaml.safe_dump({"input": "/i", "output": "/o", "labels": text}))
    with pytest.raises(ConfigError, match=message):
        load_config(job)
    endpoint = write(tmp_path / "endpoint.yaml", yaml.safe_dump({"label_sets": {"a": text, "b": {"names": text}}}))
    with pytest.raises(ConfigError, match=message):
        load_endpoint(endpoint)
    with pytest.raises(ConfigError, match=message):
        read_labels(Path(text))


TEXTS = {
    "names:\n- cat\n- dog\n": "looks like a key",
    "names: [cat, dog]\n": "looks like a key",
    "cat\nthreshold: 0.5\n": "looks like a key",
    "---\ncat\n": "a YAML document",
    'item {\n  id: 1\n  name: "cat"\n}\n': "label map of TensorFlow",
    "id: 0\nname: cat\n": "looks like a key",
    "label\ncat\ndog\n": "heading of a column",
    "Class_Name\ncat\n": "heading of a column",
    "id,name\n0,cat\n": "heading of a column",
    "cat,0\ndog,1\n": "end with numbers",
    "cat: 0\ndog: 1\n": "end with numbers",
    "cat=1\ndog=0\n": "end with numbers",
    "cat 0\ndog 1\nbird 2\n": "numbers that count them",
    "cat_1\ndog_2\n": "numbers that count them",
    "0-cat\n1-dog\n": "numbers that count them",
    "cat, dog\nbird, fish\n": "all its lines contain commas",
    "cat;dog\n": "its only line contains semicolons",
    "| cat | dog |\n| a | b |\n": "all its lines contain vertical bars",
    "(1) cat\n(2) dog\n": "begin with numbers",
    "[1] cat\n[2] dog\n": "begin with numbers",
    "1 cat\n0 dog\n": "begin with numbers",
    "001.cat\n002.dog\n": "begin with numbers",
    "7 - cat\n3 - dog\n": "begin with numbers",
    "cat (0)\ndog (1)\n": "numbers that count them",
    "Labels:\ncat\n": "looks like a key",
    "cat:\ndog:\n": "end with a colon",
    "cat\n- dog\n": "another bullet",
    "-cat\n-dog\n": "another bullet",
    "• cat\n• dog\n": "another bullet",
    "cat\n'dog'\n": "is in quotes",
    "“cat”\ndog\n": "is in quotes",
    "// pets\ncat\n": "looks like a comment",
    "; pets\ncat\n": "looks like a comment",
    "cat # pet\ndog\n": "looks like a label and a comment",
    "n01440764\nn01443537\n": "WordNet",
    "/m/011k07\n/m/011q46kg\n": "Open Images",
}


@pytest.mark.parametrize("content", TEXTS)
def test_a_text_file_that_is_something_else_is_refused_with_what_to_write(content: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=TEXTS[content]) as refused:
        read_labels(write(tmp_path / "a.txt", content))
    assert "in quotes as a list in a YAML file" in str(refused.value)
    lines = [" ".join(line.split()) for line in content.splitlines()]
    write(tmp_path / "a.yaml", "".join(f"- {json.dumps(line)}\n" for line in lines))
    assert read_labels(tmp_path / "a.yaml").label_names() == lines


@pytest.mark.parametrize(
    "lines",
    [
        ["floor 1", "floor 2", "floor 3"],
        ["iphone 4", "pixel 7"],
        ["16:9", "4:3"],
        ["1.4", "2.8", "1,000"],
        ["4-door car", "2-door car"],
        ["2-seater", "2-in-1 laptop", "3D printer"],
        ["C#", "F#", "cat #1"],
        ["cat", "label", "name"],
        ["Star Wars: A New Hope", "cat"],
        ["rock 'n' roll", "'90s style", 'the "best" cake'],
        ["n/a", "km/h", "50%", "-5", "cat"],
        ["great white shark, white shark", "hen"],
        ["cat", "2 dogs", "3 dogs"],
        ["train", "class", "no", "id"],
        ["label"],
        ["item", "items"],
    ],
)
def test_lines_that_are_only_labels_are_read(lines: list[str], tmp_path: Path) -> None:
    assert read_labels(write(tmp_path / "a.txt", "\n".join(lines))).label_names() == lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- cat\n - dog\n", "'cat - dog' spans several lines: write it on one line or in quotes"),
        ("- cat\n    dog\n- bird\n", "spans several lines"),
        ("[cat\n dog, bird]\n", "spans several lines"),
        ("names: [a]\ntemplates: [a photo of\n  '{}']\n", "spans several lines|expected"),
        ("- {name: cat, prompts: [a\n cat]}\n", "spans several lines"),
        ("- cat #1\n- dog #2\n", "text after # is a comment in YAML"),
        ("[cat, #dog\n bird]\n", "text after # is a comment"),
        ("names: [a]\nthreshold: 0.5 #low\n", "text after # is a comment"),
        ("- |  #tag\n  cat\n- dog #x\n", "text after # is a comment"),
    ],
)
def test_text_that_yaml_would_fold_or_cut_off_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_labels(write(tmp_path / "a.yaml", text))
    inline = "input: /i\noutput: /o\nlabels:\n" + "".join(f"  {line}\n" for line in text.splitlines())
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "job.yaml", inline))


@pytest.mark.parametrize(
    "text",
    [
        "input: /photos/album #1",
        "input:\n- /photos/album #1\n- /b",
        "input: [/a, #b\n  /c]",
        "input: /i\nmodel: {source: a #b\n}",
    ],
)
def test_a_path_that_yaml_would_cut_off_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="text after # is a comment in YAML: write a text that contains # in quotes"):
        load_config(write(tmp_path / "job.yaml", f"output: /o\nlabels: [a]\n{text}\n"))


def test_comments_and_quoted_text_of_several_lines_are_yaml_as_usual(tmp_path: Path) -> None:
    text = "#head\n# head\n- cat  # a pet\n#- bird\n- dog ## x\n- a#b\n- 'c #1'\n"
    text += '- "a\n  photo"\n- >-\n  of\n  cats\n#end\n'
    names = ["cat", "dog", "a#b", "c #1", "a photo", "of cats"]
    assert read_labels(write(tmp_path / "a.yaml", text)).label_names() == names
    job = "input: /i  # x\noutput: '/o' #y\nlabels: [a, b] #z\nmodel: {source: tiny} #w\nrows_per_shard: 9 #v\n"
    assert load_config(write(tmp_path / "job.yaml", job)).labels.label_names() == ["a", "b"]


@pytest.mark.parametrize("value", ["", "null", "~", "''"])
def test_an_empty_key_is_called_empty(value: str, tmp_path: Path) -> None:
    for labels in (f"labels: {value}", f"labels: {{names: {value}}}"):
        job = write(tmp_path / "job.yaml", f"input: /i\noutput: /o\n{labels}\n")
        with pytest.raises(ConfigError, match="the key is empty: write a list"):
            load_config(job)
        assert load_config(job, {"labels.names": ["a"]}).labels.label_names() == ["a"]


def test_a_text_of_several_lines_and_a_device_are_no_label_files(tmp_path: Path) -> None:
    job = write(tmp_path / "job.yaml", "input: /i\noutput: /o\nlabels: |\n  cat\n  dog\n")
    with pytest.raises(ConfigError, match="the text has several lines: write a list") as refused:
        load_config(job)
    assert len(str(refused.value).splitlines()) == 1
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/null", str(tmp_path / "pipe")):
        with pytest.raises(ConfigError, match="is no regular file: save the labels in a file"):
            read_labels(Path(path))


@pytest.mark.parametrize(
    ("dotted", "message"),
    [
        ("labels.names.1", "labels.names is a list, whose items cannot be set one by one: give the whole list"),
        ("labels.names.0.threshold", "labels.names is a list"),
        ("labels.1", "unknown key labels.1"),
        ("parquet.columns.0", "parquet.columns is a list"),
        ("input.0", "input is '/i', which has no keys: set input itself"),
        ("output.x", "output is '/o', which has no keys"),
    ],
)
def test_an_override_inside_a_list_or_a_text_is_refused(dotted: str, message: str, tmp_path: Path) -> None:
    text = "input: /i\noutput: /o\nlabels: [a, b, c]\nparquet: {columns: [x, y]}\n"
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "job.yaml", text), {dotted: "z"})


def test_an_override_changes_the_content_of_a_label_file(tmp_path: Path) -> None:
    write(tmp_path / "l.yaml", "names: {0: a, 1: b}\nthreshold: 0.25\ntemplates: ['q {}']\n")
    write(tmp_path / "l.txt", "x\ny\n")
    head = "input: /i\noutput: /o\n"
    for labels in ("labels: l.yaml", "labels: {names: l.yaml, top_k: 3}"):
        job = write(tmp_path / "job.yaml", f"{head}{labels}\n")
        changed = load_config(job, {"labels.names": ["z"]}).labels
        assert (changed.label_names(), changed.threshold, changed.templates) == (["z"], 0.25, ("q {}",))
        assert load_config(job, {"labels.names.1": "z"}).labels.label_names() == ["a", "z"]
        assert load_config(job, {"labels.top_k": None}).labels.threshold == 0.25
        with pytest.raises(ConfigError, match="the present file of labels also has threshold, templates: set labels"):
            load_config(job, {"labels.names": "l.txt"})
        assert load_config(job, {"labels": "l.txt"}).labels.threshold == 0
    job = write(tmp_path / "job.yaml", f"{head}labels: {{names: l.txt, threshold: 0.5}}\n")
    assert load_config(job, {"labels.names": "l.yaml"}).labels.thresholds() == [0.5, 0.5]


def test_an_override_changes_a_label_set_that_is_an_object() -> None:
    given = LabelSet.model_validate({"names": ["a", {"name": "b", "threshold": 0.5}], "templates": ["q {}"]})
    raw: dict[str, Any] = {"input": "/i", "output": "/o", "labels": given}
    override_key(raw, "labels.top_k", 1, JobConfig)
    labels = JobConfig(**raw).labels
    assert (labels.top_k, labels.names, labels.templates) == (1, given.names, given.templates)


def test_the_order_of_overrides_does_not_matter(tmp_path: Path) -> None:
    job = write(tmp_path / "job.yaml", "input: /i\noutput: /o\nlabels: [a]\n")
    for keys in (["labels.threshold", "labels"], ["labels", "labels.threshold"]):
        labels = load_config(job, {key: ["q"] if key == "labels" else 0.5 for key in keys}).labels
        assert (labels.label_names(), labels.threshold) == (["q"], 0.5)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda v: {"names": ["a"], "threshold": v},
        lambda v: {"names": ["a"], "top_k": v},
        lambda v: {"names": [{"name": "a", "threshold": v}]},
        lambda v: {"names": [{"name": "a", "accept": v}]},
        lambda v: {"names": [{"name": "a", "calibration": {"scale": v, "bias": 0}}]},
        lambda v: {"names": [{"name": "a", "calibration": {"scale": 1, "bias": v}}]},
        lambda v: {"names": [{"name": "a", "probe": {"model": "m", "weights": "AACAPw==", "bias": v}}]},
    ],
)
def test_true_and_false_are_no_numbers(make: Callable[[bool], object], value: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps(make(value)))
    with pytest.raises(ConfigError, match=f"expected a number, not {str(value).lower()}"):
        read_labels(path)
    write(tmp_path / "a.yaml", json.dumps(make(value)))
    with pytest.raises(ConfigError, match=r"valid (number|integer)"):
        read_labels(tmp_path / "a.yaml")


@pytest.mark.parametrize("key", ["threshold", "top_k"])
def test_true_is_no_number_in_a_request(key: str) -> None:
    with pytest.raises(ValidationError, match="expected a number, not true"):
        LabelQuery.model_validate({"labels": ["a"], key: True})


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ('["a", "\\ud800"]', "names.1.name"),
        ('{"names": ["a"], "templates": ["{} \\ud800"]}', "templates.0"),
        ('[{"name": "a", "prompts": ["b", "\\udfff"]}]', "names.0.prompts.1"),
        ('{"names": ["a", "b"], "groups": {"\\ud800": ["a", "b"]}}', "groups"),
        ('{"names": ["a", "b"], "groups": {"g": ["a", "\\ud800"]}}', "groups.g.1"),
    ],
)
def test_half_of_a_character_is_refused_with_its_key(content: str, key: str, tmp_path: Path) -> None:
    """JSON may have the escape of one half of a character, which cannot be written as UTF-8."""
    for name in ("a.json", "a.yaml"):
        with pytest.raises(ConfigError, match="contains half of a character, U\\+D") as refused:
            read_labels(write(tmp_path / name, content))
        assert key in str(refused.value)
        assert str(refused.value).encode()


def test_a_label_file_beside_the_settings_is_found(tmp_path: Path) -> None:
    write(tmp_path / "labels.txt", "cat\ndog\n")
    text = "label_sets: {a: labels.txt, b: {names: labels.txt, top_k: 1}}"
    sets = load_endpoint(write(tmp_path / "endpoint.yaml", text)).label_sets
    assert [one.label_names() for one in sets.values()] == [["cat", "dog"]] * 2
    job = write(tmp_path / "job.yaml", "input: /i\noutput: /o\nlabels: {names: labels.txt, top_k: null}\n")
    assert load_config(job).labels.top_k is None


@pytest.mark.parametrize("value", [True, False, 1, 1.1, None, b"cat"])
def test_a_label_that_is_no_text_is_refused(value: object) -> None:
    """Another YAML loader than ours, such as Ray Serve's, has lost the text: 1.1 may have been 1.10."""
    with pytest.raises(ValidationError, match="is not text: write it in quotes"):
        LabelSet.model_validate(["a", value])


@pytest.mark.parametrize("labels", [[1], [1.10], [True], [None], ["cat", 2]])
def test_a_request_with_a_label_that_is_no_text_is_refused(labels: list[object]) -> None:
    for schema, body in ((LabelQuery, {"labels": labels}), (HuggingFaceParameters, {"candidate_labels": labels})):
        with pytest.raises(ValidationError, match="valid string"):
            schema.model_validate(body)


def test_a_setting_that_is_no_text_in_yaml_says_so(tmp_path: Path) -> None:
    job = write(tmp_path / "job.yaml", "input: 2024-01-01\noutput: 017\nlabels: [a]\n")
    with pytest.raises(ConfigError, match="write it in quotes"):
        load_config(job)
    job = write(tmp_path / "job.yaml", "input: a\ninput: b\noutput: c\nlabels: [a]\n")
    with pytest.raises(ConfigError, match="the key input stands twice"):
        load_config(job)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["caf\u00e9", "cafe\u0301"], "look the same"),
        (["cat", "cat\u200b"], "invisible character U\\+200B"),
        (["cat", "cat\u200d"], "look the same"),
        (["cat", " cat"], "look the same"),
        (["red car", "red  car"], "look the same"),
        (["red car", "red\u00a0car"], "look the same"),
        (["\ufeffcat"], "invisible character U\\+FEFF"),
        (["cat\n"], "invisible character U\\+000A"),
        (["\u2764\ufe0f", "\u2764"], "look the same"),
        (["\u845b\U000e0100", "\u845b"], "look the same"),
        (["e\u200d\u0301", "\u00e9"], "look the same"),
        (["\ufe0fcat"], "invisible character U\\+FE0F"),
        (["\u200d"], "invisible character U\\+200D"),
        (["\U0001f3f4\U000e0067"], "invisible character U\\+E0067"),
    ],
)
def test_labels_that_look_the_same_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(LabelError, match=message):
        LabelSet.model_validate(names).check(siglip)


@pytest.mark.parametrize(
    "char",
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u200b\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2060\u2061"
    "\u2062\u2063\u2064\u2065\u2066\u2067\u2068\u2069\u206a\u206f\u2800\u3164\ufeff\uffa0\ufff0\ufff9\ufffb\ufffc\U0001bca0"
    "\U0001d173\U000e0001\U000e0020\U000e007f\U000e01f0\u0085\u007f\u0000",
)
def test_a_character_that_cannot_be_seen_is_refused_in_every_text(char: str) -> None:
    for labels in (
        {"names": [f"cat{char}x"]},
        {"names": [{"name": "cat", "prompts": [f"a{char}cat"]}]},
        {"names": ["cat"], "templates": [f"a{char}photo of {{}}"]},
        {"names": ["cat", "dog"], "groups": {f"p{char}ets": ["cat", "dog"]}},
    ):
        with pytest.raises(LabelError, match=f"invisible character U\\+{ord(char):04X}: remove it"):
            LabelSet.model_validate(labels).check(siglip)


@pytest.mark.parametrize(
    "names",
    [
        ["\u2764\ufe0f heart"],
        ["1\ufe0f\u20e3", "2\ufe0f\u20e3"],
        ["\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "\U0001f3f4"],
        ["\u1828\u180b\u1820"],
        ["\u845b\U000e0100\u57ce"],
        ["\U0001fae8 face"],
        ["\ue000 sign"],
        ["caf\u00e9", "cafe"],
    ],
)
def test_emoji_and_words_that_need_invisible_characters_are_no_fault(names: list[str]) -> None:
    LabelSet.model_validate(names).check(siglip2)


def test_joiners_inside_words_and_emoji_are_no_fault() -> None:
    LabelSet.model_validate(
        ["\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "family \U0001f468\u200d\U0001f469"]
    ).check(siglip)


def test_what_calibrate_and_probe_write_is_read_back(tmp_path: Path) -> None:
    labels = LabelSet.model_validate(
        {
            "names": [*WORDS, "a: b", "#x", " y ", "- z", "é", {"name": "cut", "threshold": 1e-05, "accept": 0.5}],
            "groups": {"no": ["no", "1.10"]},
            "top_k": None,
        }
    )
    write_labels(tmp_path / "a.yaml", labels)
    assert read_labels(tmp_path / "a.yaml") == labels
    assert yaml.safe_load((tmp_path / "a.yaml").read_text())["groups"] == {"no": ["no", "1.10"]}


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("data.yaml", "path: x\ntrain: images\nnc: 2\nnames: [cat, dog]\n", "leave only names, templates"),
        ("index.json", '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}', "write only the label"),
        ("reversed.json", '{"cat": 0, "dog": 1}', "write the names as a list"),
        ("empty.txt", "", "neither a list of labels"),
        ("comments.txt", "# none\n", "neither a list of labels"),
        ("empty.yaml", "[]", "neither a list of labels"),
        ("empty.json", "{}", "neither a list of labels"),
        ("excel.csv", "ID;Name\n1;cat\n", "separated by ';'"),
        ("tabs.csv", "id\tname\n1\tcat\n", "separated by '\\t'"),
    ],
)
def test_a_refusal_names_the_file_and_what_to_write(tmp_path: Path, name: str, content: str, advice: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(advice)) as raised:
        read_label_file(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


def test_the_keys_of_a_label_set_are_those_of_its_class() -> None:
    assert set(SET_KEYS) == set(LabelSet.model_fields)
