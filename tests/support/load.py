"""Clients that keep an endpoint busy while something happens to it."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import httpx


class Load:
    """Clients that send one request after the other until the `with` block ends."""

    def __init__(self, url: str, clients: int = 4) -> None:
        self._url = url
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(clients)]
        self.results: list[tuple[float, int]] = []
        """When each request ended, and its status, 0 if there was no response."""
        self.failures: list[str] = []
        """How long each request took that did not succeed, and its response, for messages of tests."""

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        body = {"model": "tiny", "input": "a red circle"}
        with httpx.Client(base_url=self._url, timeout=60, headers={"host": "localhost"}) as client:
            while not self._over.is_set():
                status, text, began = 0, "no response", time.monotonic()
                with suppress(httpx.TransportError):
                    response = client.post("/v1/embeddings", json=body)
                    status, text = response.status_code, response.text
                self.results.append((time.monotonic(), status))
                if status != 200:
                    self.failures.append(f"{time.monotonic() - began:.2f} s: {status} {text[:200]}")

    def await_success(self, since: float) -> None:
        """Wait until a request after `since` was answered with 200."""
        give_up = time.monotonic() + 90
        while not any(when > since and status == 200 for when, status in list(self.results)):
            assert time.monotonic() < give_up, "no request succeeded any more"
            time.sleep(0.01)

    def failed(self, since: float) -> list[tuple[float, int]]:
        """The requests after `since` that did not succeed."""
        return [(when, status) for when, status in self.results if when > since and status != 200]
