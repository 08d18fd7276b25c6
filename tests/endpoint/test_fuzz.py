"""A fuzz of the published schema: whatever it allows, and much that it does not, is answered, and never with a 500."""

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
OPERATIONS = 12


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_no_request_is_an_internal_error(mode: GenerationMode) -> None:
    with run_endpoint(make_config()) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        statuses: Counter[int] = Counter()
        operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
        assert len(operations) == OPERATIONS
        if mode == GenerationMode.NEGATIVE:  # a GET cannot be asked wrongly: any text is a model's id
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
            def ask(case: Case[Any]) -> None:
                answer = case.call(base_url=running.url)
                statuses[answer.status_code] += 1
                check(answer.status_code, answer)

            ask()
    assert statuses[400] > EXAMPLES
    assert statuses[200] or mode == GenerationMode.NEGATIVE


def check(status: int, answer: Any) -> None:
    """A success, or the envelope with a documented code and nothing of this server's insides."""
    if status == 200:
        return
    error = answer.json()["error"]
    assert 400 <= status < 500, answer.text
    assert error["code"] in CODES or error["code"] in REASONS or error["code"].startswith("fetch_")
    assert "Traceback" not in error["message"]
