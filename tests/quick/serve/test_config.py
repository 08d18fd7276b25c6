"""The endpoint's configuration: the shipped files, the messages about invalid values, and `sightline serve`."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from serve.app import build
from serve.config import EndpointConfig, describe_keys, load_endpoint
from serve.rayserve.internals import PROXY_CALLBACK
from serve.rayserve.proxy import CALLBACK_PATH
from sightline.cli import app
from sightline.demo.shapes import LABELS
from storage.settings import ConfigError

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"


def test_serve_yaml_deploys_the_config_of_endpoint_yaml() -> None:
    raw = yaml.safe_load((CONFIGS / "serve.yaml").read_text())
    [application] = ServeDeploySchema.model_validate(raw).applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    # Ray Serve calls this function with a file's args. It converts them to the type of the builder's argument.
    front = call_user_app_builder_with_args_if_necessary(build, application.args)._bound_deployment
    config = front.init_args[0]
    assert isinstance(config, EndpointConfig)
    assert config == load_endpoint(CONFIGS / "endpoint.yaml")
    assert config.label_sets["shapes"].label_names() == list(LABELS)
    assert PROXY_CALLBACK in (CONFIGS / "serve.yaml").read_text()
    assert CALLBACK_PATH in (CONFIGS / "serve.yaml").read_text()


def test_build_takes_replicas_and_resources_from_the_config() -> None:
    config = EndpointConfig.model_validate(
        {
            "model": {"batch_size": 8},
            "replicas": {"min": 1, "max": 3, "num_gpus": 0.5, "num_cpus": 2, "resources": {"fast": 1}},
            "ingress": {"min": 2, "num_cpus": 4},
        }
    )
    front = build(config)._bound_deployment
    assert front.num_replicas == 2
    assert front.ray_actor_options == {"num_cpus": 4, "resources": {}}
    model = front.init_args[1]._bound_deployment
    assert model.max_ongoing_requests == 16, "one batch of 8 that runs, and one that is being filled"
    assert model.ray_actor_options == {"num_cpus": 2, "num_gpus": 0.5, "resources": {"fast": 1}}
    assert model._deployment_config.autoscaling_config.max_replicas == 3


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"modle": {}}, "unknown key modle: did you mean model?"),
        ({"model": {"source": "tiny", "dtype": "int4"}}, "model.dtype"),
        ({"replicas": {"min": 3, "max": 2}}, "max is 2, less than min 3"),
        ({"limits": {"in_flight": 10}}, "one request may hold 2374"),
        ({"limits": {"body_bytes": 100, "in_flight_bytes": 10}}, "one request would not fit"),
        ({"label_sets": {"a": ["x", "x"]}}, "label 'x' is listed twice"),
        ({"label_sets": {"a": "no-such-file.yaml"}}, "no-such-file.yaml does not exist"),
        ({"label_sets": {"": ["x"]}}, "empty name"),
    ],
)
def test_the_error_of_a_bad_config_says_what_to_change(raw: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "endpoint.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError) as error:
        load_endpoint(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_paths_are_relative_to_the_config_file(tmp_path: Path) -> None:
    (tmp_path / "colors.txt").write_text("red\nblue\n")
    (tmp_path / "endpoint.yaml").write_text("label_sets: {colors: colors.txt}\nauth: {keys_file: keys}\n")
    (tmp_path / "keys").write_text("")
    config = load_endpoint(tmp_path / "endpoint.yaml")
    assert config.label_sets["colors"].label_names() == ["red", "blue"]
    assert config.auth.keys_file == tmp_path / "keys"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("model: {source: nowhere}", [], "model.source: nowhere is not a directory"),
        ("{}", ["--host", "0.0.0.0"], "--host 0.0.0.0: without API keys the endpoint listens on loopback only"),
        ("{}", ["--host", "::"], "without API keys"),
        ("auth: {keys_file: /nowhere/keys}", [], "keys_file /nowhere/keys: cannot be read"),
        ("{}", ["--host", "192.0.2.77"], "without API keys"),
        ("- a", [], "expected keys and values"),
    ],
)
def test_the_command_refuses_a_bad_config_or_host_without_a_traceback(
    text: str, options: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "endpoint.yaml").write_text(text)
    result = CliRunner().invoke(app, ["serve", str(tmp_path / "endpoint.yaml"), *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_the_error_of_a_port_in_use_names_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", str(CONFIGS / "endpoint.yaml"), "--port", str(port)])
    assert result.exit_code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in " ".join(result.output.split())


def test_the_documentation_has_every_key() -> None:
    """`docs/endpoint.md` contains the table that `python -m serve.config` prints, between two markers."""
    text = (ROOT / "docs" / "endpoint.md").read_text()
    table = text.partition("<!-- keys -->")[2].partition("<!-- /keys -->")[0].strip()
    assert table == describe_keys(), "print the new table with `python -m serve.config` and paste it there"
    assert "| `limits.image.max_bytes` | `20971520 (20 MiB)` |" in table, (
        "the table must have the endpoint's default, not the job's"
    )


def test_every_key_has_a_description() -> None:
    rows = [line.split(" | ") for line in describe_keys().splitlines()[2:]]
    assert len(rows) > 60
    assert [key for key, _, meaning in rows if len(meaning) < 10] == []
