"""The examples of docs/endpoint.md, and what OpenAI's client does with ids and with an overloaded server.

`tests/clients/` runs the clients themselves.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from serve.admission.auth import new_key
from tests.conftest import require
from tests.support.endpoint import Endpoint, make_config, run_endpoint, shape_png
from tests.support.searched_output import write_shapes

MODEL = "google/siglip-base-patch16-256"
PAGE = Path(__file__).parents[2] / "docs" / "endpoint.md"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Endpoint, str]]:
    """An endpoint that serves the model under the name `MODEL`, and its key."""
    key, line = new_key("tests")
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(line + "\n")
    with run_endpoint(make_config(name=MODEL, auth={"keys_file": str(keys)})) as running:
        yield running, key


@pytest.fixture(scope="module")
def client(keyed: tuple[Endpoint, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{keyed[0].url}/v1", api_key=keyed[1], max_retries=0) as opened:
        yield opened


def test_an_id_may_contain_a_slash(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4' here"):
        client.models.retrieve("gpt-4")


def test_the_openai_client_reports_the_rate_limit_and_retries_an_overloaded_server(tmp_path: Path) -> None:
    key, line = new_key("one")
    (tmp_path / "keys").write_text(line + "\n")
    auth = {"keys_file": str(tmp_path / "keys"), "requests_per_minute": 1}
    with run_endpoint(make_config(auth=auth)) as running:
        without_retries = openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0)
        with without_retries:
            without_retries.embeddings.create(model="tiny", input="a")
            with pytest.raises(openai.RateLimitError, match="1 requests a minute") as limited:
                without_retries.embeddings.create(model="tiny", input="a")
        assert int(limited.value.response.headers["retry-after"]) <= 60
    with run_endpoint(make_config()) as running:
        controller, limit = running.service.admission, running.service.config.limits.requests
        controller.in_flight.requests += limit
        refused = 0
        retry_after = controller.retry_after

        def count_and_make_room() -> float:
            nonlocal refused
            refused += 1
            controller.in_flight.requests -= limit  # so that the client's second attempt is admitted
            return retry_after()

        controller.retry_after = count_and_make_room  # type: ignore[method-assign]
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="-", max_retries=2) as with_retries:
            assert with_retries.embeddings.create(model="tiny", input="a").data
        assert refused == 1


def read_examples(language: str) -> list[str]:
    """Return the code blocks of docs/endpoint.md in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def open_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Endpoint, Path]]:
    """An endpoint without API keys, and a folder with the image that the examples of docs/endpoint.md use."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "shape.png").write_bytes(shape_png("red circle"))
    searched = write_shapes(tmp_path_factory.mktemp("searched") / "tags")
    with run_endpoint(make_config(search={"output": searched.uri})) as running:
        yield running, folder


@pytest.mark.parametrize("example", read_examples("sh"))
def test_a_documented_command_succeeds(example: str, open_endpoint: tuple[Endpoint, Path]) -> None:
    running, folder = open_endpoint
    if "curl" not in example:
        assert example.startswith(("sightline serve", "serve deploy", "sightline key new", "SIGHTLINE_")), example
        return
    require("curl", None if shutil.which("curl") else "apt-get install curl")
    script = example.replace("http://127.0.0.1:8000", running.url).replace("curl ", "curl -sS --fail-with-body ")
    done = subprocess.run(["bash", "-euc", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "red circle" in done.stdout or "embedding" in done.stdout


@pytest.mark.parametrize("example", read_examples("python"))
def test_a_documented_python_client_succeeds(example: str, open_endpoint: tuple[Endpoint, Path]) -> None:
    running, folder = open_endpoint
    script = example.replace("http://127.0.0.1:8000", running.url)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "red circle" in done.stdout


def test_the_documentation_has_an_example_for_each_client() -> None:
    text = "\n".join(read_examples("python") + read_examples("sh"))
    assert all(word in text for word in ("openai", "huggingface_hub", "cohere", "curl", "-F image=", "/v1/similarity"))
