"""The command `sightline-haproxy`, which Ray Serve starts as HAProxy: see `serve.rayserve.haproxy`.

It is in this package so that `sightline/__init__.py` runs first and installs the import guard. Otherwise, with
PYTHONPATH=., a user's own `serve.py` would be imported.
"""

from serve.rayserve.haproxy import main

__all__ = ["main"]
