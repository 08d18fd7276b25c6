"""The unmodified Python clients of OpenAI, Hugging Face and Cohere, and the examples of docs/endpoint.md."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cohere
import httpx
import huggingface_hub
import numpy as np
import openai
import pytest

from serve.admission.auth import new_key
from tests.conftest import require
from tests.support.endpoint import Endpoint, data_uri, make_config, run_endpoint, shape_png

MODEL = "google/siglip-base-patch16-256"
PAGE = Path(__file__).parents[2] / "docs" / "endpoint.md"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Endpoint, str]]:
    """An endpoint that requires an API key and serves the model under the name `MODEL`, and the key."""
    key, line = new_key("tests")
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(line + "\n")
    with run_endpoint(make_config(name=MODEL, auth={"keys_file": str(keys)})) as running:
        yield running, key


@pytest.fixture(scope="module")
def client(keyed: tuple[Endpoint, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{keyed[0].url}/v1", api_key=keyed[1], max_retries=0) as opened:
        yield opened


def test_the_openai_client_embeds_texts_and_images(client: openai.OpenAI) -> None:
    image = data_uri(shape_png("blue star"))
    # Without `encoding_format` the client requests base64 and decodes it.
    single = client.embeddings.create(model=MODEL, input="a photo of a blue star")
    assert len(single.data[0].embedding) == 128
    several = client.embeddings.create(
        model=MODEL, input=["a photo of a blue star", image, "a photo of a red ring"], encoding_format="float"
    )
    assert [item.index for item in several.data] == [0, 1, 2]
    np.testing.assert_allclose(single.data[0].embedding, several.data[0].embedding, atol=2e-6)
    text, picture, other = (np.array(item.embedding) for item in several.data)
    assert text @ picture > other @ picture
    assert np.linalg.norm(picture) == pytest.approx(1, abs=1e-5)
    assert several.model == MODEL
    assert 2 * 5 <= several.usage.total_tokens < 2 * 16
    images = client.embeddings.create(model=MODEL, input=[image, image])
    np.testing.assert_allclose(images.data[1].embedding, picture, atol=2e-6)
    assert client.embeddings.create(model=MODEL, input="a", dimensions=128).data


def test_the_openai_client_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4' here"):
        client.models.retrieve("gpt-4")


def test_the_openai_client_raises_its_own_error_types(client: openai.OpenAI, keyed: tuple[Endpoint, str]) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot be shortened") as shortened:
        client.embeddings.create(model=MODEL, input="a", dimensions=64)
    assert shortened.value.code == "unsupported_dimensions"
    assert shortened.value.param == "dimensions"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="text-embedding-3-small", input="a")
    with pytest.raises(openai.BadRequestError, match="token ids"):
        client.embeddings.create(model=MODEL, input=[1, 2, 3])
    unknown_key = openai.OpenAI(base_url=f"{keyed[0].url}/v1", api_key="sl-wrong", max_retries=0)
    with unknown_key, pytest.raises(openai.AuthenticationError, match="this API key is not known"):
        unknown_key.models.list()


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


def test_the_hugging_face_client_classifies_and_embeds(keyed: tuple[Endpoint, str], tmp_path: Path) -> None:
    endpoint, key = keyed
    client = huggingface_hub.InferenceClient(model=endpoint.url, token=key)
    labels = ["red circle", "blue star", "green ring"]
    (tmp_path / "star.png").write_bytes(shape_png("blue star"))
    for image in (shape_png("blue star"), str(tmp_path / "star.png")):
        scores = client.zero_shot_image_classification(
            image, candidate_labels=labels, hypothesis_template="a photo of a {}"
        )
        assert scores[0].label == "blue star"
        assert {element.label for element in scores} == set(labels)
        assert [element.score for element in scores] == sorted((e.score for e in scores), reverse=True)
    vector = client.feature_extraction("a photo of a blue star")
    assert vector.shape == (1, 128)
    assert vector.dtype == np.float32
    pair = huggingface_hub.InferenceClient(base_url=endpoint.url, api_key=key).feature_extraction(["a", "b"])
    assert np.shape(pair) == (2, 128)


def test_the_cohere_client_embeds_images_and_texts(keyed: tuple[Endpoint, str]) -> None:
    endpoint, key = keyed
    with httpx.Client() as http:
        embed_with_cohere(cohere.ClientV2(api_key=key, base_url=endpoint.url, httpx_client=http))
        unknown_key = cohere.ClientV2(api_key="no", base_url=endpoint.url, httpx_client=http)
        with pytest.raises(cohere.UnauthorizedError):
            unknown_key.embed(model=MODEL, input_type="search_query", texts=["a"], embedding_types=["float"])


def embed_with_cohere(client: cohere.ClientV2) -> None:
    image = data_uri(shape_png("green heart"))
    pictures = client.embed(model=MODEL, input_type="image", images=[image, image], embedding_types=["float"])
    assert pictures.embeddings.float_ is not None
    assert np.shape(pictures.embeddings.float_) == (2, 128)
    texts = client.embed(
        model=MODEL, input_type="search_query", texts=["a green heart", "a red star"], embedding_types=["float"]
    )
    assert texts.embeddings.float_ is not None
    scores = np.array(texts.embeddings.float_) @ np.array(pictures.embeddings.float_[0])
    assert scores[0] > scores[1]
    inputs = [{"content": [{"type": "image_url", "image_url": {"url": image}}]}]
    mixed = client.embed(model=MODEL, input_type="image", inputs=inputs, embedding_types=["float"])  # type: ignore[arg-type]
    assert mixed.embeddings.float_ is not None
    np.testing.assert_allclose(mixed.embeddings.float_[0], pictures.embeddings.float_[0], atol=2e-6)


def read_examples(language: str) -> list[str]:
    """Return the code blocks of docs/endpoint.md in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def open_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Endpoint, Path]]:
    """An endpoint without API keys, and a folder with the image that the examples of docs/endpoint.md use."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "shape.png").write_bytes(shape_png("red circle"))
    with run_endpoint(make_config()) as running:
        yield running, folder


@pytest.mark.parametrize("example", read_examples("sh"))
def test_a_documented_command_succeeds(example: str, open_endpoint: tuple[Endpoint, Path]) -> None:
    running, folder = open_endpoint
    if "curl" not in example:
        assert example.startswith(("sightline serve", "serve deploy", "sightline key new")), example
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
