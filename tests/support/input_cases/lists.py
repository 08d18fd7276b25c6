"""Cases of the section "Lists of images"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.input_cases.case import InputCase
from tests.support.input_cases.parquet import ONE, TWO


def _list(name: str, text: str | bytes) -> dict[str, Any]:
    def build(folder: Path) -> None:
        for file, data in (("a.jpg", ONE), ("b c.jpg", TWO)):
            (folder / file).write_bytes(data)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return {"build": build, "settings": {"input": f"{{folder}}/{name}"}}


def _case(kind: str, rule: str, name: str, text: str | bytes, tagged: int = 0, **expected: Any) -> InputCase:
    made = _list(name, text)
    build: Callable[[Path], object] = made["build"]
    return InputCase(
        kind, rule, build, tagged, settings={**made["settings"], **expected.pop("settings", {})}, **expected
    )


TITLE = "Lists of images"
TEXT = (
    "A list is a file that is itself an input: `.txt` with a URI on each line, `.csv` and `.tsv` with a header, "
    "`.jsonl` and `.ndjson` with an object on each line. Relative paths are relative to the list's folder, and "
    "taken literally. Each row is a row of the output, and its other columns are its `metadata`, a JSON text: "
    "the values of a table are strings as they stand (`1.50`), those of JSON Lines keep their types, so that the "
    "number 1.50 becomes 1.5. A later run adds the rows that are new: as many equal rows (the same URI and the same "
    "other columns, in any order) as "
    "the list has more than before. The same file given twice is one list; two lists are two lists, of which equal "
    "rows count together: a second list with a row that is planned adds it only when both lists are inputs of one "
    "run. An image of a folder is not tagged once more if a list names it; if it was missing when a list named it, "
    "`--retry-rejects missing` tags the list's row. A list that is gone at a later run waits, with exit code 1. The "
    "column of "
    "URIs is `lists.column`; else one with the name of an image (`image`, `image_path`, `image_url`, ...); else "
    "one with the name of a URI (`path`, `filepath`, `filename`, `url`, ...). The run prints it. A file that "
    "breaks its format is refused by line, since any guess would lose rows."
)
CASES: tuple[InputCase, ...] = (
    _case(
        "a text list; lines that begin with `#`, blank lines",
        "comments and blank lines are no rows",
        "l.txt",
        "# text\n\na.jpg\nb c.jpg\n",
        2,
    ),
    _case(
        "a comment that ends like an image's name",
        "counted: for an image of this name write `./#1.jpg`",
        "l.txt",
        "#1.jpg\na.jpg\n",
        1,
        skipped={"comments in lists that end like an image's name": 1},
    ),
    _case(
        "several captions of one image",
        "a row for each",
        "l.csv",
        "image,caption\na.jpg,one\na.jpg,two\na.jpg,one\n",
        3,
    ),
    _case(
        "`filepath`, `File Name`, `imagePath`, ...",
        "names count without case, `_`, `-` and spaces",
        "l.csv",
        "File Path,title\na.jpg,x\n",
        1,
    ),
    _case(
        "separators `;`, tab and `|`",
        "the one that gives the header a column of URIs",
        "l.csv",
        "path;caption\na.jpg;x, y\n",
        1,
    ),
    _case(
        "quoted fields with line ends, quotes and separators",
        "as they stand",
        "l.csv",
        'path,caption\na.jpg,"one\n""two"", three"\n',
        1,
    ),
    _case(
        "a field of 200,000 characters",
        "read; the limit is 16 Mi",
        "l.csv",
        f"path,caption\na.jpg,{'x' * 200_000}\n",
        1,
    ),
    _case(
        "a byte order mark; line ends of Windows and of old Macs",
        "read",
        "l.csv",
        "\ufeffpath,n\r\na.jpg,1\r\nb c.jpg,2\r",
        2,
    ),
    _case("JSON Lines", "read", "l.jsonl", '{"path": "a.jpg", "tags": ["x"]}\n', 1),
    _case(
        "JSON objects of which some have a key of a higher rank",
        "set `lists.column`: the order of the objects must not decide",
        "l.jsonl",
        '{"path": "a.jpg"}\n{"path": "a.jpg", "image": "b c.jpg"}\n',
        refused="line 2 has the URI as 'image'",
    ),
    _case(
        "an image that is not there", "the others are tagged", "l.txt", "a.jpg\nno.jpg\n", 1, rejected={"missing": 1}
    ),
    _case(
        "a row without a URI",
        "its key is the list and the line",
        "l.csv",
        "path,caption\na.jpg,x\n,y\n",
        1,
        rejected={"missing": 1},
    ),
    _case(
        "blanks around a URI",
        "they belong to the name: the detail of the reject shows them",
        "l.csv",
        "path,caption\na.jpg,x\n b c.jpg,y\n",
        1,
        rejected={"missing": 1},
    ),
    _case(
        "a first column without a name, as pandas writes its index",
        'kept in `metadata` under the key `""`; it does not count when rows are compared',
        "l.csv",
        ",path\n0,a.jpg\n1,b c.jpg\n",
        2,
    ),
    _case(
        "a value in another column without a name",
        "name the column",
        "l.csv",
        "path,\na.jpg,x\n",
        refused="line 2 has 'x' in column 2",
    ),
    _case(
        "a row of separators only",
        "counted",
        "l.csv",
        "path,caption\na.jpg,x\n,\n",
        1,
        skipped={"empty rows of lists": 1},
    ),
    _case(
        "an http(s) URL",
        "see [Images on the web](#images-on-the-web)",
        "l.txt",
        "a.jpg\nhttps://host/1.jpg\n",
        refused="line 2 is an http(s) URL, and fetching from the web is off: set fetch.enabled: true",
    ),
    _case(
        "a quote that is not closed",
        "named by line",
        "l.csv",
        'path,caption\na.jpg,"oops\nb c.jpg,x\n',
        refused="line 2 is no valid row",
    ),
    _case(
        "more or fewer fields than the header has",
        "named by line",
        "l.csv",
        "path,caption\na.jpg,x, y\n",
        refused="line 2 has 3 fields",
    ),
    _case("no header", "add one", "l.csv", "a.jpg,x\n", refused="add a header line"),
    _case("an empty CSV file", "add a header", "l.csv", "", refused="l.csv is empty: add a header line"),
    _case(
        "two columns of the same rank", "set `lists.column`", "l.csv", "url,path\nx,a.jpg\n", refused="set lists.column"
    ),
    _case(
        "the same with `lists.column`",
        "the configured column",
        "l.csv",
        "url,path\nx,a.jpg\n",
        1,
        settings={"lists": {"column": "path"}},
    ),
    _case("two columns of one name", "rename one", "l.csv", "path,n,n\na.jpg,1,2\n", refused="two columns 'n'"),
    _case(
        'UTF-16, as Excel\'s "Unicode Text" is',
        "save it as UTF-8",
        "l.csv",
        "path\na.jpg\n".encode("utf-16"),
        refused="UTF-16",
    ),
    _case(
        "text that is not UTF-8, or holds a NUL", "save it as UTF-8", "l.csv", b"path\n\xe9.jpg\n", refused="not UTF-8"
    ),
    _case("a text list with tabs", "use `.tsv` with a header", "l.txt", "a.jpg\tx\n", refused="has a tab"),
    _case(
        "a data: URI", "put images into a Parquet file", "l.txt", "data:image/png;base64,AAAA\n", refused="data: URI"
    ),
)
