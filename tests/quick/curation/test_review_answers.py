"""The answers file of a review: what is on disk, who may write to it, and what two pages may do to each other."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest

from curation.review.answers import AnswerFile, Conflict, NewAnswer, answers_path, read_answer_lines
from storage.settings import ConfigError
from tests.support.samples import make_sample

SAMPLE = make_sample(["cat", "cat", "dog"])
ODD_KEY = "a\u2028b\x85c\x0bd\x1ce\rf.jpg"
"""A key with characters at which `str.splitlines` splits."""


def save(file: AnswerFile, row: int, answer: str, version: int = 0) -> None:
    file.save([NewAnswer(row, answer, version)])


def test_an_answer_is_a_line_with_what_it_is_about(tmp_path: Path) -> None:
    with closing(AnswerFile(tmp_path, SAMPLE, "anna")) as file:
        save(file, 2, "wrong")
        assert file.path == tmp_path / "answers-anna.jsonl"
        [line] = file.path.read_text().splitlines()  # on disk when `save` returns
    row = json.loads(line)
    assert row.pop("at").endswith("+00:00")
    assert row == {
        "id": "000000-000000/2",
        "key": "2.jpg",
        "sha256": f"{2:064x}",
        "label": "dog",
        "sample": "s1",
        "stratum": 0,
        "weight": 2.0,
        "score": 0.5,
        "answer": "wrong",
    }


def test_keys_with_characters_that_end_lines_elsewhere_are_read_again(tmp_path: Path) -> None:
    odd = SAMPLE.set_column(1, "key", pa.array([ODD_KEY] * 3))
    with closing(AnswerFile(tmp_path, odd)) as file:
        save(file, 0, "right")
        save(file, 1, "wrong")
    with closing(AnswerFile(tmp_path, odd)) as file:
        assert file.current == {0: "right", 1: "wrong"}
    rows, dropped = read_answer_lines(tmp_path / "answers.jsonl")
    assert [row["key"] for row in rows] == [ODD_KEY, ODD_KEY]
    assert dropped == 0


@pytest.mark.parametrize("half", [b'{"id": "000', b'{"id": "\xe2\x80', b"\x00\x00\x00"])
def test_an_unfinished_last_line_is_dropped_and_counted(tmp_path: Path, half: bytes) -> None:
    with closing(AnswerFile(tmp_path, SAMPLE)) as file:
        save(file, 0, "right")
    path = tmp_path / "answers.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + half)
    rows, dropped = read_answer_lines(path)
    assert (len(rows), dropped) == (1, 1)
    assert path.read_bytes() == whole + half  # a reader changes nothing
    with closing(AnswerFile(tmp_path, SAMPLE)) as file:
        assert file.dropped == 1
        save(file, 1, "wrong")
    assert [row["answer"] for row in read_answer_lines(path)[0]] == ["right", "wrong"]


def test_a_whole_last_line_without_a_line_feed_is_kept(tmp_path: Path) -> None:
    with closing(AnswerFile(tmp_path, SAMPLE)) as file:
        save(file, 0, "right")
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip(b"\n"))  # as an editor may leave it
    assert len(read_answer_lines(path)[0]) == 1
    with closing(AnswerFile(tmp_path, SAMPLE)) as file:
        assert (file.current, file.dropped) == ({0: "right"}, 0)
        save(file, 1, "wrong")
    assert [row["answer"] for row in read_answer_lines(path)[0]] == ["right", "wrong"]


@pytest.mark.parametrize("bad", ["{", "null", "[1]", '"text"'])
def test_a_line_in_the_middle_that_is_no_object_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(f'{{"answer": "right"}}\n\n{bad}\n{{"answer": "right"}}\n')
    with pytest.raises(ConfigError, match="line 3"):
        read_answer_lines(path)


@pytest.mark.parametrize(
    "change", [{"answer": "yes"}, {"sample": "s2"}, {"sample": None}, {"label": "bird"}, {"id": 7}, {"label": ["cat"]}]
)
def test_answers_of_another_sample_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    line = {"id": "000000-000000/0", "label": "cat", "sample": "s1", "answer": "right", **change}
    (tmp_path / "answers.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ConfigError, match="answer 1"):
        AnswerFile(tmp_path, SAMPLE)
    (tmp_path / "answers.jsonl").unlink()
    AnswerFile(tmp_path, SAMPLE).close()  # the refused file is not locked any more


def test_a_sample_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no column 'sample': draw it again"):
        AnswerFile(tmp_path, SAMPLE.drop_columns(["sample"]))
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused_and_told_what_to_do(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from curation.review.answers import AnswerFile;"
        "from tests.support.samples import make_sample;"
        "file = AnswerFile(Path(sys.argv[1]), make_sample(['cat', 'cat', 'dog']));"
        "print('open', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(ConfigError, match="--name NAME"):
            AnswerFile(tmp_path, SAMPLE)
        AnswerFile(tmp_path, SAMPLE, "ben").close()
        other.kill()  # the kernel gives the lock back, so no stale lock is left
        other.wait()
    AnswerFile(tmp_path, SAMPLE).close()


def test_an_answer_given_elsewhere_in_the_meantime_is_not_replaced(tmp_path: Path) -> None:
    with closing(AnswerFile(tmp_path, SAMPLE)) as file:
        save(file, 0, "right")
        with pytest.raises(Conflict) as caught:  # both tabs have shown the question as not answered
            file.save([NewAnswer(1, "right", 0), NewAnswer(0, "wrong", 0)])
        assert caught.value.states == [(0, "right", 1)]
        assert file.current == {0: "right"}  # nothing of the request is saved
        save(file, 0, "right")  # the same answer is no conflict, and a request that is repeated writes nothing
        assert file.version == 1
        save(file, 0, "wrong", 1)
        with pytest.raises(Conflict):
            save(file, 0, "taken back", 1)
        save(file, 0, "taken back", 2)
        assert file.current == {}
    assert len(read_answer_lines(tmp_path / "answers.jsonl")[0]) == 3


def test_versions_and_changes_survive_a_restart(tmp_path: Path) -> None:
    with closing(AnswerFile(tmp_path, SAMPLE)) as file:
        file.save([NewAnswer(2, "right", 0), NewAnswer(0, "unsure", 0)])
        save(file, 2, "wrong", 1)
        before = [file.changes(since) for since in range(4)]
    assert before == [[(0, "unsure", 2), (2, "wrong", 3)], [(0, "unsure", 2), (2, "wrong", 3)], [(2, "wrong", 3)], []]
    with closing(AnswerFile(tmp_path, SAMPLE)) as file:
        assert [file.changes(since) for since in range(4)] == before
        assert list(file.current) == [0, 2]


def test_a_write_that_fails_leaves_no_part_of_it(tmp_path: Path) -> None:
    with closing(AnswerFile(tmp_path, SAMPLE)) as file:
        save(file, 0, "right")
        whole = file.path.read_bytes()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, before[1]))  # a full disk takes a part, too
        try:
            with pytest.raises(OSError, match="large"):
                file.save([NewAnswer(1, "right", 0), NewAnswer(2, "wrong", 0)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert file.path.read_bytes() == whole
        assert file.current == {0: "right"}
        file.save([NewAnswer(1, "right", 0), NewAnswer(2, "wrong", 0)])
    assert [row["answer"] for row in read_answer_lines(tmp_path / "answers.jsonl")[0]] == ["right", "right", "wrong"]


def test_bad_answers_are_refused(tmp_path: Path) -> None:
    with closing(AnswerFile(tmp_path, SAMPLE)) as file:
        with pytest.raises(ValueError, match="no such answer"):
            save(file, 0, "yes")
        for row in (-1, 3):
            with pytest.raises(IndexError):
                save(file, row, "right")
        with pytest.raises(ValueError, match="one row"):
            file.save([NewAnswer(0, "right", 0), NewAnswer(0, "wrong", 0)])
        assert file.path.read_bytes() == b""


@pytest.mark.parametrize("name", ["a/b", "../x", "a b", "a.b", "x" * 65, "a\n"])
def test_names_that_are_no_part_of_a_file_name_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits"):
        answers_path(tmp_path, name)
    assert answers_path(tmp_path, "Anna-2_ä").name == "answers-Anna-2_ä.jsonl"
