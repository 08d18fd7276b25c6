"""What of this folder is collected."""

from __future__ import annotations

from tests.k8s.support.control_plane import is_at_hand

# Not skipped: there is no package of these programs that CI could install.
collect_ignore = [] if is_at_hand() else ["test_control_plane.py"]
