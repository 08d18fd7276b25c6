"""An index of an output in a bucket: it grows, and finds what an exact search finds."""

from __future__ import annotations

import pytest

from benchmarks.index import draw_images, draw_texts
from benchmarks.outputs import SyntheticOutput, write_output
from curation.index import build as build_module
from curation.index.build import build_index
from curation.index.search import search_index
from curation.search.query import Query
from curation.search.search import search_output
from curation.tagged_output import open_output
from pipelines.upkeep.verify import verify_output
from siglip.labels import LabelSet
from storage.settings import ConfigError
from tests.support.stores.azurite import Azurite
from tests.support.stores.google_server import GoogleServer
from tests.support.stores.radosgw import Radosgw

WIDTH = 16


@pytest.mark.parametrize(
    "scheme", [pytest.param("s3", marks=pytest.mark.s3), "gs", pytest.param("az", marks=pytest.mark.azure)]
)
def test_an_index_in_a_bucket_finds_what_an_exact_search_finds(
    scheme: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture = {"s3": "s3", "gs": "google", "az": "azurite"}[scheme]
    server: Radosgw | GoogleServer | Azurite = request.getfixturevalue(fixture)
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(build_module, "TRAINED_FROM", 300)
    monkeypatch.setattr(build_module, "_BATCHES_A_COMMIT", 1)
    root = f"{scheme}://{server.new_bucket()}/some folder/out"
    labels = LabelSet.model_validate({"names": ["cat", "dog"], "threshold": 0.5})
    texts = draw_texts(2, WIDTH, 1)
    write_output(root, SyntheticOutput(labels, texts, 3, lambda shard: draw_images(400, WIDTH, shard)))
    output = open_output(root)
    with pytest.raises(ConfigError, match="has no index"):
        search_index(output, Query(["dog"]))
    built = build_index(output)
    assert (built.rows, built.added) == (1200, 1200)
    assert min(built.recall_images, built.recall_texts) >= 0.95
    assert build_index(output).added == 0
    for name in labels.label_names():
        query = Query([name], top=10, cutoff="none")
        exact, found = (one(output, query).table["id"].to_pylist() for one in (search_output, search_index))
        assert len({*exact} & {*found}) >= 9
    assert verify_output(output.output).ok
