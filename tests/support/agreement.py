"""The batch job and the endpoint on the same images: their numbers must be the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
from rich.console import Console

from pipelines.config import JobConfig
from pipelines.job import run_job
from sightline.progress import RunProgress
from tests.support.endpoint import Endpoint, data_uri


def check_agreement(endpoint: Endpoint, model: Mapping[str, Any], images: list[bytes], folder: Path) -> None:
    """Tag images with the endpoint's model and its label set `shapes`, in `folder`, and classify them over HTTP.

    Embeddings, labels, scores and fingerprints must be equal.
    """
    for number, data in enumerate(images):
        (folder / f"{number:03}.img.png").write_bytes(data)
    labels = endpoint.service.config.label_sets["shapes"].model_copy(update={"threshold": 0.0})
    job = JobConfig.model_validate(
        {"input": str(folder), "output": str(folder / "out"), "labels": labels, "model": {**model, "compile": False}}
    )
    run_job(job, RunProgress(Console(quiet=True)))
    rows = {row["key"][-11:]: row for row in ds.dataset(folder / "out" / "data").to_table().to_pylist()}
    assert len(rows) == len(images)
    for number, data in enumerate(images):
        row = rows[f"{number:03}.img.png"]
        uri = data_uri(data)
        online = endpoint.post("/v1/classify", {"image": uri, "label_set": "shapes", "threshold": 0}).json()
        [embedding] = endpoint.post("/v1/embeddings", {"model": endpoint.service.name, "input": uri}).json()["data"]
        np.testing.assert_allclose(embedding["embedding"], row["embedding"], atol=2e-6)
        assert [label["label"] for label in online["data"][0]["labels"]] == row["labels"]
        np.testing.assert_allclose([label["score"] for label in online["data"][0]["labels"]], row["scores"], rtol=1e-4)
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    assert online["fingerprint"]["model"] == manifest["fingerprint"]["model.weights"]
    assert online["fingerprint"]["labels"] == manifest["fingerprint"]["labels.digest"]
