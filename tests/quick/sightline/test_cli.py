"""The command line's contract: exit codes, one line that says what to change, and help that is complete."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner, Result

from pipelines.config import JobConfig, absolute
from serve.config import EndpointConfig
from sightline.cli import app
from sightline.commands.skipped import print_skipped
from storage.key_table import list_settings
from storage.settings import list_keys
from tests.support.images import encode, make_rgb

CONFIGS = Path(__file__).parents[3] / "configs"


def invoke(*arguments: str) -> Result:
    """The command in this process: for what ends before any work."""
    return CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"})


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., str]:
    """Writes a config over a folder with one image; keys given replace those of the config."""
    (tmp_path / "input").mkdir()
    (tmp_path / "input/a.png").write_bytes(encode(make_rgb()))
    base = {"input": str(tmp_path / "input"), "output": str(tmp_path / "output"), "labels": ["cat", "dog"]}

    def write(**keys: Any) -> str:
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in {**base, **keys}.items() if v is not None}))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        ({"lables": ["x"]}, [], "unknown key lables: did you mean labels?"),
        ({"model": {"sorce": "tiny"}}, [], "unknown key model.sorce: did you mean source?"),
        ({"labels": {"names": ["a"], "treshold": 1}}, [], "did you mean threshold?"),
        ({"output": None}, [], "output is missing"),
        ({"labels": []}, [], "labels.names: the list is empty: give at least one"),
        ({"labels": {"names": ["a"], "templates": []}}, [], "labels.templates: the list is empty: give at least one"),
        ({"model": "tiny"}, [], "model: expected keys and values (known: batch_size, compile, device,"),
        ({"cost": 3}, [], "cost: expected keys and values (known: per_hour) (given: '3')"),
        ({}, ["--set", "labels={names: [a], threshold: 0,1}"], "labels.1: write numbers with a decimal point"),
        ({}, ["--set", "labels={names: [a], top_k: 0,1}"], "labels.1: write numbers with a decimal point"),
        ({"input": None, "Input": "x"}, [], "unknown key Input: did you mean input?"),
        ({"output": None, "outputs": "x", "labls": []}, [], "unknown key outputs: did you mean output?"),
        ({"input": "in/{date}"}, ["--set", "dates=soon"], "dates.0: expected a date, such as 2026-11-30"),
        ({"labels": ["a", "a"]}, [], "'a' is listed twice"),
        ({"labels": "nowhere.txt"}, [], "nowhere.txt does not exist"),
        ({"rows_per_shard": 0}, [], "rows_per_shard: Input should be greater than 0 (given: '0')"),
        ({"actors": {"min": 3, "max": 2}}, [], "actors.max is 2, less than actors.min 3"),
        ({"decode": "quick"}, [], "decode: Input should be 'auto', 'exact' or 'fast'"),
        ({}, ["--set", "actors"], "expected key.path=value"),
        ({}, ["--set", "actors.mx=2"], "unknown key actors.mx: did you mean max?"),
        ({}, ["--input", "/no/such/folder"], "/no/such/folder does not exist"),
        ({}, ["--input", "abfs://bucket/x"], "only local paths and s3://, gs://, az:// and hf:// are supported"),
        (
            {"model": {"source": "no/such/directory/at/all"}},
            [],
            "is not a directory, an s3://, gs:// or az:// prefix, or a hub id",
        ),
        ({"output": "/proc/nothing/can/be/written/here"}, [], "/proc/nothing"),
        ({"model": {"batch_size": 0}}, [], "model.batch_size"),
        ({"parquet": {"columns": ["width"]}}, [], "columns: {width: original_width}"),
        ({"labels": ["C", "C++"]}, [], "'C' and 'C++' are the same text to this model"),
        ({"on_missing": "delete"}, [], "on_missing: Input should be 'wait' or 'reject'"),
        ({}, ["missing"], "unexpected missing: reasons go with --retry-rejects"),
        ({}, ["--retry-rejects", "because"], "--retry-rejects because: no such reason (known: empty,"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    job: Callable[..., str], keys: dict[str, Any], options: list[str], message: str
) -> None:
    result = invoke("tag", job(**keys), *options)
    assert result.exit_code == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("sightline: ")
    assert message in last
    assert "Traceback" not in result.output


def test_other_mistakes(tmp_path: Path, job: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke("tag", str(tmp_path / "none.yaml")).exit_code == 2
    (tmp_path / "broken.yaml").write_text("input: [")
    assert "not YAML" in invoke("tag", str(tmp_path / "broken.yaml")).stderr
    (tmp_path / "list.yaml").write_text("- a")
    assert "expected keys and values" in invoke("tag", str(tmp_path / "list.yaml")).stderr
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "clip/preprocessor_config.json").write_text("{}")
    result = invoke("tag", job(model={"source": str(tmp_path / "clip")}))
    assert (result.exit_code, "is a model of type clip, not siglip" in result.stderr) == (2, True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = invoke("tag", job(model={"source": "google/siglip-base-patch16-256"}))
    assert (result.exit_code, "could not be fetched from the hub" in result.stderr) == (2, True)
    assert invoke("verify", str(tmp_path)).exit_code == 2
    assert invoke("verify", str(tmp_path / "nowhere")).exit_code == 2
    assert invoke("tag").exit_code == 2
    assert invoke("frobnicate").exit_code == 2
    assert invoke("model", "init", str(tmp_path), "--arch", "base").exit_code == 2
    assert invoke("model", "init", str(tmp_path / "new"), "--arch", "huge").exit_code == 2
    assert not (tmp_path / "new").exists()


def test_help_is_complete() -> None:
    text = " ".join(invoke("tag", "--help").stdout.split())
    for option in ("--input", "--output", "--set", "--retry-rejects", "CONFIG", "REASON"):
        assert option in text
    for key, _, description in list_keys(JobConfig):
        assert key in text
        assert description
    text = " ".join(invoke("serve", "--help").stdout.split())
    rows = list(list_settings(EndpointConfig, EndpointConfig()))
    assert len(rows) > 60
    for key, default, _ in rows:
        assert f"{key} ({default})" in text, key
    for command, options in {
        "verify": ("--json", "--remove-orphans", "OUTPUT"),
        "demo": ("DIR",),
        "model": ("init",),
    }.items():
        text = invoke(command, "--help").stdout
        assert all(option in text for option in options), command
    text = invoke("model", "init", "--help").stdout
    assert all(option in text for option in ("--arch", "--seed", "base", "tiny"))


@pytest.mark.parametrize("name", ["demo.yaml", "nightly.yaml", "labelling.yaml"])
def test_the_shipped_configs_are_valid(name: str) -> None:
    from pipelines.config import load_config

    config = load_config(CONFIGS / name)
    assert len(config.labels.names) >= 3
    # What a run on another checkpoint and input needs is one option each.
    assert load_config(CONFIGS / name, {"model.source": "tiny"}).model.source == "tiny"


def test_an_input_that_is_a_link_to_itself_ends_before_any_work(job: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    result = invoke("tag", job(), "--input", str(tmp_path / "loop"))
    assert (result.exit_code, "loop" in result.stderr.splitlines()[-1]) == (2, True), result.stderr
    assert not (tmp_path / "output").exists()


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The object store's endpoint refuses connections."""
    monkeypatch.setattr("storage.retry.PAUSE_SECONDS", 0)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{held.getsockname()[1]}"
    variables = {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "1"}
    for name, value in {**variables, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "labels.yaml").write_text("[cat, dog]")
    (tmp_path / "truth.jsonl").write_text("{}")
    (tmp_path / "endpoint.yaml").write_text("model: {source: 's3://bucket/model'}")


@pytest.mark.parametrize(
    "command",
    [
        "verify s3://bucket/out",
        "report s3://bucket/out",
        "sample s3://bucket/out {folder}/sample",
        "export s3://bucket/out {folder}/coco.json --to coco",
        "retag s3://bucket/out --labels {folder}/labels.yaml --output {folder}/new",
        "calibrate s3://bucket/out --truth {folder}/truth.jsonl",
        "probe s3://bucket/out --truth {folder}/truth.jsonl",
        "evaluate s3://bucket/out --truth {folder}/truth.jsonl",
        "labels diff s3://bucket/out s3://bucket/other",
        "labels check {folder}/labels.yaml --model s3://bucket/model",
        "serve {folder}/endpoint.yaml",
        "tag {folder}/job.yaml --input s3://bucket/in",
        "tag {folder}/job.yaml --output s3://bucket/out",
        "tag {folder}/job.yaml --set model.source=s3://bucket/model",
    ],
)
def test_a_store_that_does_not_answer_is_exit_code_1(
    command: str, job: Callable[..., str], tmp_path: Path, unreachable: None
) -> None:
    """2 would say that the command line or a file must be changed. Scripts run a command that ended with 1 again."""
    job()
    result = invoke(*command.format(folder=tmp_path).split())
    last = result.stderr.strip().splitlines()[-1]
    assert (result.exit_code, "cannot reach S3 at http://127.0.0.1" in last) == (1, True), result.stderr


def test_types_without_a_common_one_end_before_any_work(job: Callable[..., str], tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", "one")):
        pq.write_table(pa.table({"image": [b"x"], "score": [value]}), tmp_path / f"input/{name}.parquet")
    result = invoke("tag", job(parquet={"columns": ["score"]}))
    last = result.stderr.strip().splitlines()[-1]
    assert (result.exit_code, "'score' is string in" in last, "b.parquet" in last) == (2, True, True), last
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("name", ["unsupported", "unsupported_pixels"])
def test_rows_rejected_under_a_renamed_reason_are_retried(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retried: list[list[str]] = []

    def record(job: object, retry: list[str], limit: object) -> int:
        retried.append(retry)
        return 0

    monkeypatch.setattr("sightline.commands.tag.run_and_summarize", record)
    path = tmp_path / "job.yaml"
    path.write_text("input: .\noutput: out\nlabels: [cat]\n")
    done = CliRunner().invoke(app, ["tag", str(path), "--retry-rejects", name])
    assert (done.exit_code, retried) == (
        0,
        [["unsupported", "unsupported_pixels"] if name == "unsupported" else [name]],
    )


@pytest.mark.parametrize("key", ["input", "output"])
@pytest.mark.parametrize("path", ["", "  ", "file://"])
def test_an_empty_path_is_refused(key: str, path: str) -> None:
    """An unset variable in a template must not become the working directory."""
    with pytest.raises(ValidationError, match="is empty"):
        JobConfig(**{"input": "x", "output": "y", "labels": ["a"], key: path})


def test_the_folder_above_a_link_is_that_of_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "real/sub").mkdir(parents=True)
    (tmp_path / "home/link").symlink_to(tmp_path / "real/sub")
    monkeypatch.chdir(tmp_path)
    assert absolute("home/link/../right") == str(tmp_path / "real/right")
    assert absolute("home/link/..") == str(tmp_path / "real")
    assert absolute("home/link/x") == str(tmp_path / "home/link/x")  # other links stay as they are
    assert absolute("/") == "/"


def test_skipped_files_are_told_in_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """A night has the same ones again: a count for each kind, and the end of one name."""
    counts = Counter({f".x{number} files": 100 - number for number in range(40)})
    counts |= {"hidden files": 1, "inputs that do not exist": 2}
    folder = "/a/long/path/to/the/photos/of/all/years" * 9
    names = {"hidden files": [f"{folder}/trip/.git/HEAD"] * 3, "inputs that do not exist": [folder + "x" * 99]}
    print_skipped(counts, {**names, ".x0 files": ["a.x0"]})
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"skipped {counts.total():,}: 100 .x0 files (a.x0), 99 .x1 files, ")
    assert "1 hidden files (.../the/photos/of/all/years/trip/.git/HEAD)" in text
    assert f"2 inputs that do not exist (...{'x' * 40})" in text
    assert text.endswith("files with 35 other suffixes")
    assert len(text) < 300


def test_an_empty_output_is_refused(job: Callable[..., str], tmp_path: Path) -> None:
    """A variable that is not set: the images would go into the configuration's output."""
    for command in ("tag", "plan"):
        for value in ("", " "):
            result = invoke(command, job(), "--output", value)
            assert (result.exit_code, "--output is empty" in result.stderr) == (2, True)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("below", ["", "/more/folders"])
def test_an_output_that_is_a_file_is_refused(job: Callable[..., str], tmp_path: Path, below: str) -> None:
    (tmp_path / "output").write_text("mine")
    result = invoke("tag", job(output=f"{tmp_path}/output{below}"))
    assert result.exit_code == 2
    assert ("Not a directory" if below else "output is a file and not a folder") in result.stderr
    assert (tmp_path / "output").read_text() == "mine"


def test_ctrl_c_during_the_imports_ends_in_one_line() -> None:
    code = """
import sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from sightline.start import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "sightline: interrupted\n")


def test_a_folder_with_other_files_does_not_become_an_output(job: Callable[..., str], tmp_path: Path) -> None:
    """`--output photos`, where `--input photos` was meant."""
    for name in ("input", "notes"):
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "notes/.hidden").write_text("x")
    (tmp_path / "notes/todo.txt").write_text("x")
    for name, file in (("input", "a.png"), ("notes", "todo.txt")):
        before = sorted((tmp_path / name).iterdir())
        result = invoke("tag", job(output=str(tmp_path / name)))
        assert result.exit_code == 2
        assert f"is no output and has files, such as {file}" in result.stderr
        assert sorted((tmp_path / name).iterdir()) == before


def test_the_process_ends_without_the_interpreters_finalization() -> None:
    """Threads of Arrow that are still releasing what they have read would end it with SIGABRT."""
    code = """
import atexit, sys, threading, time
import sightline.cli
from sightline.start import main
class Kept:
    def __del__(self):
        print("finalized", flush=True)
kept = Kept()
def work():
    time.sleep(0.5)
    print("the thread has ended")
def app():
    threading.Thread(target=work).start()
    atexit.register(print, "atexit has run")
    print("buffered", end=" ")
    sys.exit(3)
sightline.cli.app = app
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (3, "buffered the thread has ended\natexit has run\n")
