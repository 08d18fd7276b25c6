"""Azurite, Microsoft's emulator of Azure Blob Storage, on loopback. npm installs it into a cache of the tests."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import signal
import socket
import subprocess
import time
import urllib.request
import uuid
from email.utils import formatdate
from pathlib import Path

from tests.support.clients.worker import NODE, install_packages

PACKAGE = Path(__file__).parent / "azurite_package"
"""The folder that names Azurite's version, and those of what it needs."""
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The account and key that every Azurite has. They are in its documentation."""
_API = "2021-12-02"
_SECONDS = 60


class Azurite:
    """A running server, with its objects in memory. `stop` ends it."""

    def __init__(self, cache: Path) -> None:
        """Start it. It is installed into `cache` first if it is not there. Raises `NotInstalledError`."""
        program = install_packages(cache, PACKAGE) / "node_modules/azurite/dist/src/blob/main.js"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = int(free.getsockname()[1])
        self.endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
        arguments = ["--blobPort", str(port), "--inMemoryPersistence", "--skipApiVersionCheck", "--silent"]
        self._process = subprocess.Popen([NODE, program, *arguments], stdout=subprocess.DEVNULL, start_new_session=True)
        for _ in range(10 * _SECONDS):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            except OSError:
                time.sleep(0.1)
        self.stop()
        raise RuntimeError("Azurite did not start")

    @property
    def env(self) -> dict[str, str]:
        """The environment variables that a client needs."""
        return make_env(self.endpoint)

    def new_bucket(self) -> str:
        """Make an empty container, and return its name."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": _API}
        lines = ["PUT", *[""] * 11, *(f"{name}:{value}" for name, value in headers.items())]
        text = "\n".join([*lines, f"/{ACCOUNT}/{ACCOUNT}/{name}", "restype:container"])
        signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), hashlib.sha256)).decode()
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{signature}"
        request = urllib.request.Request(f"{self.endpoint}/{name}?restype=container", method="PUT", headers=headers)
        with urllib.request.urlopen(request, timeout=30):
            return name

    def stop(self) -> None:
        """End the server."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)


def make_env(endpoint: str) -> dict[str, str]:
    """The environment variables of a client of an Azurite at this address."""
    return {
        "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": KEY,
        "AZURE_STORAGE_ENDPOINT": endpoint,
    }
