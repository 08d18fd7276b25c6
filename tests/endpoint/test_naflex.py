"""A NaFlex checkpoint in the batch job and in the endpoint: nothing but `model.source` is changed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from PIL import Image

from curation.model import OutputModel
from curation.tagged_output import open_output
from pipelines.config import JobConfig
from pipelines.output.fingerprint import make_fingerprint
from serve.rayserve.replica import ModelServer
from sightline import Encoder as PublicEncoder
from siglip.checkpoint import pin_model
from siglip.config import Limits, ModelConfig
from siglip.encoder import Encoder
from siglip.images.decode import decode_image
from siglip.images.patches import read_grids
from tests.support.agreement import check_agreement
from tests.support.checkpoints import make_naflex
from tests.support.endpoint import Endpoint, data_uri, make_config, run_endpoint
from tests.support.images import awkward_cases, encode, make_rgb

SHAPES = [(640, 480), (480, 640), (1920, 1080), (40, 800), (3000, 1), (1, 1), (7, 5), (256, 256)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"source": str(make_naflex(tmp_path_factory.mktemp("naflex") / "model")), "dtype": "float32"}


@pytest.fixture(scope="module")
def endpoint(model: dict[str, Any]) -> Iterator[Endpoint]:
    with run_endpoint(make_config(model={**model, "batch_size": 16})) as running:
        yield running


@pytest.fixture
def turned() -> bytes:
    """A photo that lies on its side, and whose EXIF orientation says so."""
    image = make_rgb(640, 480, 5)
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(image, "JPEG", quality=95, exif=exif.tobytes())


def test_batch_job_and_endpoint_give_the_same_numbers(
    endpoint: Endpoint, model: dict[str, Any], local_ray: None, tmp_path: Path, turned: bytes
) -> None:
    images = [data for _, data, _ in awkward_cases()]
    images += [encode(make_rgb(*size, seed), "JPEG") for seed, size in enumerate(SHAPES)]
    images += [turned, encode(make_rgb(4000, 3000), "JPEG")]
    check_agreement(endpoint, model, images, tmp_path)
    output = open_output(str(tmp_path / "out"))
    assert output.fingerprint["model.patches"] == 256
    assert "model.image_size" not in output.fingerprint
    # What the commands on an output do with images, and the Python API.
    files = [tmp_path / f"{number:03}.img.png" for number in range(len(images))]
    rows = ds.dataset(tmp_path / "out" / "data").to_table().to_pylist()
    written = {row["key"][-11:]: row["embedding"] for row in rows}
    expected = np.asarray([written[file.name] for file in files], np.float32)
    np.testing.assert_allclose(OutputModel(output).embed_images(files), expected, atol=2e-6)
    public = PublicEncoder.load(model["source"], dtype="float32")
    np.testing.assert_allclose(public.images(files), expected, atol=2e-6)


def test_an_image_is_cut_as_it_stands_upright(model: dict[str, Any], turned: bytes) -> None:
    spec = pin_model(ModelConfig(**model)).spec
    decoded = decode_image(turned, spec, Limits())
    assert (decoded.width, decoded.height) == (480, 640)
    assert read_grids(decoded.pixels[None]).tolist() == [[18, 14]]


def test_what_the_model_sees_is_in_the_description_of_the_model(endpoint: Endpoint) -> None:
    [card] = endpoint.client.get("/v1/models").json()["data"]
    assert card["patches"] == 256
    assert "image_size" not in card


def test_broken_images_are_refused_as_by_other_models(endpoint: Endpoint) -> None:
    cut = encode(make_rgb(300, 200), "JPEG")[:-400]
    refused = endpoint.post("/v1/embeddings", {"model": endpoint.service.name, "input": data_uri(cut, "image/jpeg")})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "truncated")


def test_a_replica_gives_nothing_for_images_of_another_model(endpoint: Endpoint, model: dict[str, Any]) -> None:
    """During an update, an ingress may send what another model sees. The identity says that the model is another."""
    server = ModelServer(make_config(model={**model, "patches": 64}))
    try:
        for shape in ((257, 768), (64, 64, 3)):
            done = asyncio.run(server.embed_images(np.zeros((2, *shape), np.uint8), 5.0))
            assert len(done.vectors) == 0
            assert done.numbers == f"64patches {endpoint.service.about.numbers}"
        asyncio.run(server.check_health())
    finally:
        server.close()


def test_the_fingerprint_of_another_number_of_patches_differs(model: dict[str, Any]) -> None:
    def describe(**settings: Any) -> dict[str, Any]:
        chosen = ModelConfig(**{**model, **settings})
        config = JobConfig.model_validate(
            {"input": "in", "output": "out", "labels": ["a"], "model": chosen.model_dump()}
        )
        return make_fingerprint(config, pin_model(chosen), pa.schema([]))

    own, same, other = describe(), describe(patches=256), describe(patches=1024)
    assert own == same
    assert {name for name in other if other[name] != own[name]} == {"model.weights", "model.patches"}
    square = describe(source="tiny")
    assert square["model.image_size"] == 64
    assert not {name for name in square if "patch" in name}


def test_the_cosines_of_known_images_can_be_recorded(model: dict[str, Any]) -> None:
    """`sightline model check` describes the checkpoint, and prints an entry for known.json."""
    from typer.testing import CliRunner

    from sightline.cli import app

    checked = CliRunner().invoke(app, ["model", "check", model["source"]])
    assert checked.exit_code == 0, checked.output
    assert "at most 256 patches of 16 x 16 pixels" in checked.output
    printed = CliRunner().invoke(app, ["model", "check", model["source"], "--json"])
    [entry] = json.loads(printed.stdout).values()
    assert np.shape(entry["cosines"]) == (3, 4)
    encoder = Encoder(pin_model(ModelConfig(**model, compile=False)))
    encoder.warm_up()
