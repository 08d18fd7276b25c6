"""Fields that no table knows: an option in an object is found wherever it stands there, or the object is refused."""

from __future__ import annotations

import pytest

from serve.http.errors import ApiError
from serve.options.unknown import MOST_FIELDS, refuse_unknown


@pytest.mark.parametrize("harmless", [0, 1, MOST_FIELDS - 1, MOST_FIELDS, 10 * MOST_FIELDS])
def test_no_option_hides_behind_harmless_fields(harmless: int) -> None:
    options = {f"field {number}": 1 for number in range(harmless)}
    refuse_unknown({"config": dict(list(options.items())[:MOST_FIELDS])}, {"input"})
    with pytest.raises(ApiError):
        refuse_unknown({"config": {**options, "dimension": 64}}, {"input"})
