"""Excludes the tests that need a real control plane if none is installed."""

from __future__ import annotations

from tests.k8s.support.control_plane import is_installed

# They are not collected instead of skipped, because CI has no package of these programs to install.
collect_ignore = [] if is_installed() else ["test_control_plane.py"]
