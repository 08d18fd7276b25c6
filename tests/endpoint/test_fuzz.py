"""Random valid and invalid requests, made from the published OpenAPI schema, never cause a response of status 500."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.core.result import Ok

from serve.http.errors import CODES
from siglip.images.decode import REASONS
from tests.support.endpoint import make_config, run_endpoint

EXAMPLES = 60
OPERATIONS = 13


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_no_request_causes_an_internal_error(mode: GenerationMode) -> None:
    with run_endpoint(make_config()) as running:
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


def check_response(status: int, response: Any) -> None:
    """Check that a response is a success, or a client error with a documented code and without a Python traceback."""
    if status == 200:
        return
    error = response.json()["error"]
    assert 400 <= status < 500, response.text
    assert error["code"] in CODES or error["code"] in REASONS or error["code"].startswith("fetch_")
    assert "Traceback" not in error["message"]
