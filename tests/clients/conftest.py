"""One `sightline serve` with an API key for all tests of clients, and the processes of clients."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml

from serve.admission.auth import new_key
from siglip.scoring import Floats
from tests.conftest import require
from tests.support.clients.worker import ClientProcess, NotInstalledError, run_node, run_python
from tests.support.endpoint import EXAMPLE, data_uri, make_config, run_endpoint, shape_png
from tests.support.served_endpoint import run_command

collect_ignore = [] if "FIFTYONE_PYTHON" in os.environ else ["test_fiftyone.py"]
TEXTS = ["a photo of a red circle", "a photo of a blue star", "a photo of a green ring"]
LABELS = ["red circle", "blue star", "green ring"]


@dataclass(frozen=True)
class Served:
    """A running `sightline serve`, and one of its keys. `url` has no path."""

    url: str
    key: str

    def post(self, *inputs: str) -> httpx.Response:
        """Send texts and data: URIs to be embedded by plain HTTP."""
        return httpx.post(
            f"{self.url}/v1/embeddings",
            json={"model": "tiny", "input": list(inputs), "encoding_format": "float"},
            headers={"authorization": f"Bearer {self.key}"},
        )

    def embed(self, *inputs: str) -> Floats:
        """The embeddings of texts and data: URIs, (number of inputs, width): what a client must return too."""
        response = self.post(*inputs)
        assert response.status_code == 200, (response.status_code, response.headers, response.text)
        return np.asarray([item["embedding"] for item in response.json()["data"]], np.float32)


def best_of(scores: dict[str, float]) -> str:
    """The label with the highest score."""
    return max(scores, key=lambda label: scores[label])


def close(found: object, wanted: Floats) -> None:
    """Check that a client's vectors are these."""
    np.testing.assert_allclose(np.asarray(found), wanted, atol=2e-6)


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`configs/endpoint.yaml` with an API key, behind HAProxy. The model computes in float32."""
    folder = tmp_path_factory.mktemp("served")
    key, line = new_key("clients")
    (folder / "keys").write_text(line + "\n")
    config = yaml.safe_load(EXAMPLE.read_text())
    config["model"] = {"source": "tiny", "dtype": "float32"}
    config["auth"] = {"keys_file": str(folder / "keys")}
    (folder / "endpoint.yaml").write_text(yaml.safe_dump(config))
    with run_command("127.0.0.1", folder / "endpoint.yaml") as running:
        yield Served(running.url, key)


@pytest.fixture(scope="package")
def one_a_minute(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An endpoint without HAProxy, whose key may send one request a minute."""
    key, line = new_key("one")
    keys = tmp_path_factory.mktemp("limited") / "keys"
    keys.write_text(line + "\n")
    with run_endpoint(make_config(auth={"keys_file": str(keys), "requests_per_minute": 1})) as running:
        yield Served(running.url, key)


@pytest.fixture
def limited(one_a_minute: Served) -> Served:
    """An endpoint whose key has just sent what it may send in a minute."""
    assert one_a_minute.post("a").status_code in (200, 429)
    return one_a_minute


@pytest.fixture(scope="session")
def cache(pytestconfig: pytest.Config) -> Path:
    """Where the clients are installed. It stays for later runs."""
    assert pytestconfig.cache is not None
    return pytestconfig.cache.mkdir("clients").resolve()


@contextmanager
def required(run: Callable[[], AbstractContextManager[ClientProcess]], where: str) -> Iterator[ClientProcess]:
    """Run clients until the block ends. Without a network that has them the test is skipped, or fails in CI."""
    try:
        running = run()
    except NotInstalledError as error:
        require(f"clients from {where}", str(error))
        raise
    with running as clients:
        yield clients


# These end before `served` does, because a client keeps its connections, and the command waits for them.


@pytest.fixture(scope="package")
def node(cache: Path, served: Served) -> Iterator[ClientProcess]:
    """npm's clients."""
    with required(lambda: run_node(cache), "npm") as clients:
        yield clients


@pytest.fixture(scope="package")
def litellm(cache: Path, served: Served) -> Iterator[ClientProcess]:
    """LiteLLM's library. Its requirements do not fit `constraints.txt`, so it has an environment of its own."""
    with required(lambda: run_python(cache, "litellm"), "PyPI") as clients:
        yield clients


@pytest.fixture(scope="package")
def frameworks(cache: Path, served: Served) -> Iterator[ClientProcess]:
    """Frameworks whose requirements do not fit `constraints.txt`."""
    with required(lambda: run_python(cache, "frameworks"), "PyPI") as clients:
        yield clients


@pytest.fixture(scope="session")
def image() -> str:
    """A blue star as a data: URI of a PNG."""
    return data_uri(shape_png("blue star"))


@pytest.fixture(scope="package")
def vectors(served: Served, image: str) -> Floats:
    """The embeddings of `TEXTS` and, last, of `image`."""
    return served.embed(*TEXTS, image)
