"""Labels from files and from YAML: a label is the text that stands there, or the file is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipelines.config import JobConfig, load_config
from serve.config import load_endpoint
from serve.routes.huggingface import HuggingFaceParameters
from serve.schemas import LabelQuery
from sightline.commands.labels import read_labels
from sightline.commands.quality import write_labels
from siglip.families import siglip
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
        ("- #hashtag\n", "in YAML a # begins a comment"),
        ("- [a, b]\n", "is not text"),
        ("- a: b\n", "label {'a': 'b'} has no name"),
        ("- \n- b\n", "an empty label"),
        ("names:\n  person: 0\n  car: 1\n", "names is a mapping: write a list"),
        ("a: 0\nb: 1\n", "names is missing"),
        ("categories:\n- {id: 1, name: person}\n", "write the names of its categories"),
        ("just text\n", "neither a list of labels nor a label set"),
        ("- a\n---\n- b\n", "expected a single document"),
        ("- *cat\n", "undefined alias"),
        ("- @cat\n", "cannot start any token"),
        ("path: coco\nnames: {0: person}\nnc: 1\n", "unknown key path"),
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
        ("a.txt", "great white shark, white shark\nhammerhead, hammerhead shark\n", None),
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
        ("a.txt", "0: tench\n1: goldfish\n", "begin with ascending numbers"),
        ("a.txt", "1 person\n2 bicycle\n13 stop sign\n", "begin with ascending numbers"),
        ("a.txt", "0\tperson\n1\tcar\n", "line 1 contains a tab"),
        ("a.txt", "0,person\n1,car\n", "begin with ascending numbers"),
        ("a.txt", "n01440764 tench\nn01443537 goldfish\n", "WordNet"),
        ("a.txt", "{0: 'tench, Tinca tinca',\n 1: 'goldfish'}\n", "begins like JSON"),
        ("a.txt", '["cat", "dog"]\n', "begins like JSON"),
        ("a.txt", "- cat\n- dog\n", "begin with a dash"),
        ("a.txt", '"cat"\n"dog"\n', "in quotes"),
        ("a.txt", "cat,\ndog,\nbird\n", "end with a comma"),
        ("a.txt", "cat, dog, bird\n", "its only line contains commas"),
        ("a.txt", "\n# nothing\n", "names"),
        ("a.pbtxt", "item { name: 'cat' }\n", "must end in"),
        ("a.jsonl", '{"name": "cat"}\n', "must end in"),
        ("a.json", '["a", true]', "True is not text"),
        ("a.json", '["a", null]', "None is not text"),
        ("a.json", '["a", NaN]', "NaN is no label"),
        ("a.json", '{"names": ["a"], "names": ["b"]}', "the key names stands twice"),
        ("a.json", '{"0": ["n01440764", "tench"]}', "is not text"),
        ("a.json", '{"tench": 0, "goldfish": 1}', "names is missing"),
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
        ("a.csv", "id;name\n0;cat\n", "exactly one column"),
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


@pytest.mark.parametrize("text", ["cat, " * 100, "cat\ndog", "a" * 5000, "nowhere.txt", "/"])
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
    ],
)
def test_labels_that_look_the_same_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(LabelError, match=message):
        LabelSet.model_validate(names).check(siglip)


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
