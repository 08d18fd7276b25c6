"""The export to FiftyOne, imported by FiftyOne itself. Collected only with FIFTYONE_PYTHON: see CONTRIBUTING.md."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from curation.export.export import export_output
from tests.support.exports import LABELS, ROWS, make_output, read_rows

SCRIPT = Path(__file__).parent / "python/fiftyone_calls.py"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fiftyone_imports_all_samples(dtype: Literal["float32", "float16"], tmp_path: Path) -> None:
    output = make_output(tmp_path / "out", dtype=dtype, passed=dtype == "float16", bands=dtype == "float16")
    export_output(output, "fiftyone", tmp_path / "fo", thumbnails=True)
    command = [os.environ["FIFTYONE_PYTHON"], str(SCRIPT), str(tmp_path / "fo")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": ""})
    assert result.returncode == 0, result.stderr
    dataset, *samples = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert dataset["classes"] == {"predictions": LABELS}
    rows = read_rows(output)
    assert len(samples) == ROWS
    for sample in samples:
        wanted = rows.pop(sample["row_id"])
        assert (sample["key"], sample["labels"]) == (wanted["key"], wanted["labels"])
        assert np.array_equal(np.asarray(sample["scores"], np.float32), wanted["scores"])
        assert sample["dtype"] == "float32"
        assert np.array_equal(np.asarray(sample["embedding"], np.float32), wanted["vector"])
        assert Path(sample["filepath"]).is_file()
        assert sample["bands"] == wanted.get("bands", [])
        for name in ("caption", "number"):
            if wanted.get(name) is not None:
                assert sample[name] == wanted[name]
