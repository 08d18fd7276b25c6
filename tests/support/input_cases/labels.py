"""Cases of the section "Label files"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.images import encode, make_rgb
from tests.support.input_cases.case import InputCase

TITLE = "Label files"
TEXT = """A label is the text that stands in the file, or the file is refused with what to write. The same holds for
labels in a job's and an endpoint's YAML and for `--set labels=...`. Files are UTF-8; a byte order mark is not part of
the first label.

* `.txt`, `.names` or no suffix: one label on each line. Empty lines and lines that begin with `# ` are skipped. Lines
  that look like more than labels, such as `0: cat`, are refused: a list of quoted texts in a YAML file is always read.
* `.yaml`, `.yml`, `.json`: a list of labels, a mapping of numbers to labels, or a label set with `names`,
  `templates`, `threshold`, `top_k` and `groups`.
* `.csv`, `.tsv`: a table with a header. One column is called `label` or `name`. Columns `id` and `index` are not
  read.

In YAML each value of a label set is read as text, also `no`, `1.10` and `017`; thresholds and other numbers are
converted afterwards. Quotes are needed only around what YAML itself reads in another way: a `#` after a space, a
colon before a space, and the characters ``[ ] { } & * ! | > % @ ` `` at the start. A comment behind a label has a space
after its `#`: `- cat  # a pet` is the label `cat`, and `- cat #1` is refused. A text without quotes stands on one line.

Labels that look the same are refused, as `é` in one character and in two. So are characters that cannot be seen, in
labels, groups, prompts and templates: those that Unicode calls *default ignorable*, control characters, and a few
without a shape. Joiners and variation selectors, which emoji and words need, may stand after another character.

`--set labels.names=[...]` changes the names and keeps the other keys, also those of a label file. An item of a list
cannot be set on its own: `--set labels.names.1=...` is refused."""


def _case(kind: str, rule: str, name: str, content: str | bytes, *labels: str, refused: str | None = None) -> InputCase:
    def build(folder: Path) -> None:
        (folder / "image.png").write_bytes(encode(make_rgb()))
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    write: Callable[[Path], object] = build
    settings = {"input": "{folder}/image.png", "labels": f"{{folder}}/{name}"}
    return InputCase(kind, rule, write, int(refused is None), refused=refused, settings=settings, labels=labels or None)


def _refused(kind: str, rule: str, name: str, content: str | bytes, message: str) -> InputCase:
    return _case(kind, rule, name, content, refused=message)


CASES: tuple[InputCase, ...] = (
    _case(
        "plain words in YAML", "text", "a.yaml", "[no, 1.10, 017, 12:30, null]", "no", "1.10", "017", "12:30", "null"
    ),
    _case(
        "`names: {0: cat, 1: dog}` in YAML", "in the numbers' order", "a.yaml", "names: {1: dog, 0: cat}", "cat", "dog"
    ),
    _case("`a: b` in quotes in YAML", "text", "a.yaml", "- 'a: b'\n- 'C #'", "a: b", "C #"),
    _refused("`- #tag` in YAML", "YAML's comment: write it in quotes", "a.yaml", "- #tag", "in quotes"),
    _refused("`- a: b` in YAML", "a mapping: write it in quotes", "a.yaml", "- a: b", "in quotes"),
    _refused("`- cat #1` in YAML", "label or comment: quotes, or `# `", "a.yaml", "- cat #1", "in quotes"),
    _case("`- cat  # a pet` in YAML", "YAML's comment", "a.yaml", "- cat  # a pet", "cat"),
    _refused(
        "`- a` and ` - b` in YAML, or other text over lines", "one line, or quotes", "a.yaml", "- a\n - b", "lines"
    ),
    _refused("`!!int 017` and other tags in YAML", "write the value in quotes", "a.yaml", "- !!int 017", "!!int"),
    _refused("a key that stands twice", "remove one", "a.yaml", "names: [a]\nnames: [b]", "stands twice"),
    _refused("YOLO's `data.yaml`", "leave only `names`", "a.yaml", "nc: 1\nnames: {0: cat}", "nc"),
    _case("a list in JSON, with a number", "text", "a.json", '["cat", 1.10]', "cat", "1.10"),
    _case("a mapping of numbers in JSON", "in the numbers' order", "a.json", '{"0": "cat", "1": "dog"}', "cat", "dog"),
    _refused(
        "`true` for a number", "write a number", "a.json", '{"names": ["a"], "threshold": true}', "expected a number"
    ),
    _refused("half of a character, such as `\\ud800`", "write the character", "a.json", '["\\ud800"]', "half"),
    _refused("`labels:` without a value", "write a list or a path", "a.yaml", "names:", "empty"),
    _refused("`true` or `null` in JSON", "write it in quotes", "a.json", '["cat", true]', "in quotes"),
    _refused("names to numbers in JSON", "write a list", "a.json", '{"cat": 0}', "names"),
    _refused("COCO's annotations", "write a list of the categories' names", "a.json", '{"categories": []}', "COCO"),
    _case("a table with `id` and `name`", "the column `name`", "a.csv", "id,name\n0,cat\n1,dog\n", "cat", "dog"),
    _refused("a table with other columns", "remove them", "a.csv", "name,threshold\ncat,0.5\n", "threshold"),
    _refused("a table without a header", "add the line `label`", "a.csv", "cat\ndog\n", "label or name"),
    _case("a byte order mark, CRLF", "not part of a label", "a.txt", "\ufeffcat\r\ndog\r\n", "cat", "dog"),
    _case("`# comment` in a text file", "skipped", "a.txt", "# pets\ncat\n", "cat"),
    _refused("`#tag` in a text file", "label or comment: write a YAML file", "a.txt", "#tag\n", "begins with #"),
    _refused("`cat # pet` in a text file", "label or comment: write a YAML file", "a.txt", "cat # pet\n", "comment"),
    _refused("`0: cat`, `1: dog` in a text file", "leave only the labels", "a.txt", "0: cat\n1: dog\n", "numbers"),
    _refused("`cat,0`, `dog,1` in a text file", "leave only the labels", "a.txt", "cat,0\ndog,1\n", "numbers"),
    _refused("a comma in each line", "write one label on each line", "a.txt", "cat, dog\na, b\n", "commas"),
    _refused("`- cat` or `-cat` in each line", "leave only the labels", "a.txt", "-cat\n-dog\n", "bullet"),
    _refused("a line in quotes", "leave only the labels", "a.txt", '"cat"\ndog\n', "quotes"),
    _refused("the first line `label`, `name` or `class`", "leave it out", "a.txt", "label\ncat\n", "heading"),
    _refused("YAML in a text file", "name it `.yaml`", "a.txt", "names:\n- cat\n", "YAML"),
    _refused("TensorFlow's label map", "write one label on each line", "a.txt", "item {\nid: 1\n}\n", "TensorFlow"),
    _refused("`n01440764 tench` in a text file", "leave only the labels", "a.txt", "n01440764 tench\n", "WordNet"),
    _refused("a tab in a text file", "name it `.tsv`", "a.txt", "0\tcat\n", "tab"),
    _refused("JSON in a text file", "name it `.json`", "a.txt", '["cat"]', "JSON"),
    _refused("`cat, dog` on one line", "write one label on each line", "a.txt", "cat, dog\n", "commas"),
    _refused("UTF-16", "save it as UTF-8", "a.txt", "cat\n".encode("utf-16"), "UTF-16"),
    _refused("UTF-32", "save it as UTF-8", "a.txt", "cat\n".encode("utf-32"), "UTF-32"),
    _refused("Latin-1", "save it as UTF-8", "a.txt", "café\n".encode("latin-1"), "UTF-8"),
    _refused("a label twice", "remove one", "a.txt", "cat\ndog\ncat\n", "listed twice"),
)
