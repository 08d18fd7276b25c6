"""Random valid and invalid requests never cause a response of status 500."""

from __future__ import annotations

import base64
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.core.result import Ok

from curation.index.build import build_index
from serve.http.errors import CODES
from siglip.images.decode import REASONS
from tests.support.endpoint import make_config, run_endpoint
from tests.support.near_valid_requests import make_requests
from tests.support.searched_output import write_shapes

EXAMPLES = 60
OPERATIONS = 15


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_no_request_causes_an_internal_error(mode: GenerationMode, tmp_path: Path) -> None:
    searched = write_shapes(tmp_path / "tags")
    build_index(searched)
    with run_endpoint(make_config(search={"output": searched.uri})) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        statuses: Counter[int] = Counter()
        operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
        assert len(operations) == OPERATIONS
        if mode == GenerationMode.NEGATIVE:  # no GET can be invalid, because a model's id may be any text
            operations = [operation for operation in operations if operation.body]

        for operation in operations:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def send(case: Case[Any]) -> None:
                response = case.call(base_url=running.url)
                statuses[response.status_code] += 1
                check_response(response.status_code, response)

            send()
    assert statuses[400] > EXAMPLES
    assert statuses[200] or mode == GenerationMode.NEGATIVE


def test_no_request_that_is_almost_valid_causes_an_internal_error(tmp_path: Path) -> None:
    """Also bodies, forms, queries and headers that no schema describes. `SIGHTLINE_FUZZ` is the number of requests."""
    words = [base64.b64encode(bytes([number])).decode() + f" {number}" for number in range(256)]
    (tmp_path / "vocabulary").write_text("\n".join(words))
    searched = write_shapes(tmp_path / "tags")
    build_index(searched)
    config = make_config(
        fetch={"enabled": True, "max_seconds": 2},
        token_vocabulary=str(tmp_path / "vocabulary"),
        search={"output": searched.uri},
    )
    count, seed = int(os.environ.get("SIGHTLINE_FUZZ", "500")), int(os.environ.get("SIGHTLINE_FUZZ_SEED", "1"))
    statuses: Counter[int] = Counter()
    with run_endpoint(config) as running:
        for number, request in enumerate(make_requests(seed, count)):
            where = (number, request.method, request.path[:100], request.headers, request.body[:300])
            response = running.client.request(
                request.method, request.path, content=request.body, headers=request.headers
            )
            statuses[response.status_code] += 1
            assert response.status_code < 500, (where, response.text)
            assert len(response.content) < 500_000, where
            if response.headers.get("content-type") == "application/json" and request.method != "HEAD":
                check_response(response.status_code, response)
    assert statuses[200] > count // 20
    assert statuses[400] > count // 5


def check_response(status: int, response: Any) -> None:
    """Check that a response is a success, or a client error with a documented code and without a Python traceback."""
    if status == 200:
        return
    error = response.json()["error"]
    assert 400 <= status < 500, response.text
    assert error["code"] in CODES or error["code"] in REASONS or error["code"].startswith("fetch_")
    assert "Traceback" not in error["message"]
