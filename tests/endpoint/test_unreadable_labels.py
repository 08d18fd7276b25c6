"""Labels of requests and registered label sets that the model cannot read or tell apart, and the errors' words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sightline.commands.serving import prepare_endpoint
from storage.settings import ConfigError
from tests.support.endpoint import Endpoint, data_uri, make_config, run_endpoint, shape_png

URI = data_uri(shape_png())
LONG = "a label with far more words than the text tower of the small checkpoint reads"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with run_endpoint(make_config()) as running:
        yield running


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            ["红"],
            "labels: '红' cannot be read, because the model's tokenizer knows none of its characters: write it in",
        ),
        (["红", "蓝"], "labels: '红' cannot be read"),
        ([f"{LONG} one", "a cat", f"{LONG} two"], f"labels: '{LONG} one' and '{LONG} two' are the same tokens"),
        (["C", "C++"], "labels: 'C' and 'C++' are the same text to this model, 'this is a photo of c': write it in"),
        (["!!!"], "labels: no character of '!!!' remains, because this model's texts have no punctuation: write it in"),
        (["a", ""], "labels: a label is empty: leave it out"),
        (["a", "b", "a"], "labels: 'a' is listed twice: send it once"),
        (["a\u200b"], "labels: 'a\\u200b' contains the invisible character U+200B: remove it"),
    ],
)
def test_labels_that_the_model_cannot_tell_apart_are_refused_on_every_path(
    endpoint: Endpoint, labels: list[str], message: str
) -> None:
    for _ in range(2):  # the second time all prompts are cached
        response = endpoint.post("/v1/classify", {"image": URI, "labels": labels})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "labels")
        assert error["message"].startswith(message)
        assert "prompts" not in error["message"]
    response = endpoint.post("/v1/moderations", {"input": URI, "labels": labels})
    assert response.json()["error"]["message"] == error["message"]
    response = endpoint.post("/", {"inputs": URI, "parameters": {"candidate_labels": labels}})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "parameters.candidate_labels")
    assert error["message"].startswith(f"parameters.candidate_{message}")


@pytest.mark.parametrize("template", ["a photo", "{label} in {color}"])
def test_a_bad_template_is_named_by_its_own_field(endpoint: Endpoint, template: str) -> None:
    response = endpoint.post("/v1/classify", {"image": URI, "labels": ["a"], "templates": [template]})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "templates")
    assert error["message"].startswith("templates: ")
    parameters = {"candidate_labels": ["a"], "hypothesis_template": template}
    error = endpoint.post("/", {"inputs": URI, "parameters": parameters}).json()["error"]
    assert error["param"] == "parameters.hypothesis_template"
    assert error["message"].startswith("parameters.hypothesis_template: ")


def test_labels_with_some_unknown_characters_are_scored(endpoint: Endpoint) -> None:
    response = endpoint.post("/v1/classify", {"image": URI, "labels": ["red 红 circle", "blue star"]})
    assert response.status_code == 200
    assert response.json()["data"][0]["labels"][0]["label"] == "red 红 circle"


def test_the_endpoint_does_not_start_with_a_label_set_that_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "endpoint.yaml").write_text("label_sets:\n  colours: [red, 红]\n")
    with pytest.raises(ConfigError, match=r"labels: '红' cannot be read, .* give the label prompts"):
        prepare_endpoint(tmp_path / "endpoint.yaml", "127.0.0.1", 0)
