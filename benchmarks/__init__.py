"""Measurements behind the README's figures. Each script prints ratios against a limit measured in the same run."""

import os
import sys

if sys.argv[0] == "-m":  # `python -m benchmarks.NAME` is about to begin, and not a test that uses one of its modules
    # As in each process of Sightline, before torch is loaded: threads that wait for work and do not sleep slow down the
    # one that they wait for, and a model alone would be measured slower than in a job.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
