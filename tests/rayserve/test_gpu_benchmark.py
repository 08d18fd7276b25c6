"""`benchmarks.gpu` measures all that it lists, here on a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_of_a_gpu_is_measured_on_a_cpu() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--arch", "tiny", "--no-compile"]
    command += ["--seconds", "0.2", "--images", "32"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    assert [row[0].split(",")[0].split(":")[0] for row in rows] == [
        "limit",
        "limit",
        "the encoder",
        *["the encoder alone"] * 3,
        *["the job"] * 2,
        "the endpoint",
    ]
    assert all(float(row[1].replace(",", "")) > 0 for row in rows)


def test_without_a_gpu_it_says_how_to_run_on_the_cpu() -> None:
    code = "import torch; torch.cuda.is_available = lambda: False\nfrom benchmarks.gpu import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2
    assert "--device cpu" in done.stderr
