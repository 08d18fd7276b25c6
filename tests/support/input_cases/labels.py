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

* `.txt`, `.names` or no suffix: one label on each line. Empty lines and lines that begin with `# ` are skipped.
* `.yaml`, `.yml`, `.json`: a list of labels, a mapping of numbers to labels, or a label set with `names`,
  `templates`, `threshold`, `top_k` and `groups`.
* `.csv`, `.tsv`: a table with a header. One column is called `label` or `name`. Columns `id` and `index` are not
  read.

In YAML each value of a label set is read as text, also `no`, `1.10` and `017`; thresholds and other numbers are
converted afterwards. Quotes are needed only around what YAML itself reads in another way: a `#` after a space, a
colon before a space, and the characters ``[ ] { } & * ! | > % @ ` `` at the start. Labels that look the same are
refused, as `é` in one character and in two, and so are invisible characters."""


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
    _refused("`!!int 017` and other tags in YAML", "write the value in quotes", "a.yaml", "- !!int 017", "!!int"),
    _refused("a key that stands twice", "remove one", "a.yaml", "names: [a]\nnames: [b]", "stands twice"),
    _refused("YOLO's `data.yaml`", "leave only `names`", "a.yaml", "nc: 1\nnames: {0: cat}", "nc"),
    _case("a list in JSON, with a number", "text", "a.json", '["cat", 1.10]', "cat", "1.10"),
    _case("a mapping of numbers in JSON", "in the numbers' order", "a.json", '{"0": "cat", "1": "dog"}', "cat", "dog"),
    _refused("`true` or `null` in JSON", "write it in quotes", "a.json", '["cat", true]', "in quotes"),
    _refused("names to numbers in JSON", "write a list", "a.json", '{"cat": 0}', "names"),
    _refused("COCO's annotations", "write a list of the categories' names", "a.json", '{"categories": []}', "COCO"),
    _case("a table with `id` and `name`", "the column `name`", "a.csv", "id,name\n0,cat\n1,dog\n", "cat", "dog"),
    _refused("a table with other columns", "remove them", "a.csv", "name,threshold\ncat,0.5\n", "threshold"),
    _refused("a table without a header", "add the line `label`", "a.csv", "cat\ndog\n", "label or name"),
    _case("a byte order mark, CRLF", "not part of a label", "a.txt", "\ufeffcat\r\ndog\r\n", "cat", "dog"),
    _case("`# comment` in a text file", "skipped", "a.txt", "# pets\ncat\n", "cat"),
    _refused("`#tag` in a text file", "label or comment: write a YAML file", "a.txt", "#tag\n", "begins with #"),
    _refused("`0: cat`, `1: dog` in a text file", "leave only the labels", "a.txt", "0: cat\n1: dog\n", "numbers"),
    _refused("`n01440764 tench` in a text file", "leave only the labels", "a.txt", "n01440764 tench\n", "WordNet"),
    _refused("a tab in a text file", "name it `.tsv`", "a.txt", "0\tcat\n", "tab"),
    _refused("JSON in a text file", "name it `.json`", "a.txt", '["cat"]', "JSON"),
    _refused("`cat, dog` on one line", "write one label on each line", "a.txt", "cat, dog\n", "commas"),
    _refused("UTF-16", "save it as UTF-8", "a.txt", "cat\n".encode("utf-16"), "UTF-16"),
    _refused("Latin-1", "save it as UTF-8", "a.txt", "café\n".encode("latin-1"), "UTF-8"),
    _refused("a label twice", "remove one", "a.txt", "cat\ndog\ncat\n", "listed twice"),
)
