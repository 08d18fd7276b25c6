"""A server with the part of Qdrant's REST API that exports use, on loopback. The client's embedded mode does the work.

Like the real server it refuses requests over 32 MiB, and payloads or vectors that are no JSON.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from qdrant_client import QdrantClient
from qdrant_client.models import Filter, PointStruct, VectorParams

LIMIT = 32 * 2**20


class QdrantServer:
    """Serves while it is a context. `client` sees the same collections. `bodies` are the sizes of uploads, in bytes.

    After `most` uploads it answers 503.
    """

    def __init__(self) -> None:
        self.client = QdrantClient(":memory:")
        self.bodies: list[int] = []
        self.most = sys.maxsize
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def _answer(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(size)
                status, result = 400, None
                if size <= LIMIT:
                    with server._lock:
                        status, result = server._do(self.command, self.path, json.loads(body) if body else {}, size)
                data = json.dumps({"result": result, "status": "ok", "time": 0.0}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_PUT = do_POST = _answer  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> QdrantServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.client.close()

    def _do(self, method: str, path: str, body: dict[str, Any], size: int) -> tuple[int, Any]:
        path = path.partition("?")[0]
        if method == "GET" and path == "/":
            return 200, None
        found = re.fullmatch(r"/collections/([^/]+)(/.*)?", path)
        assert found, path
        name, rest = found[1], found[2] or ""
        if (method, rest) == ("GET", "/exists"):
            return 200, {"exists": self.client.collection_exists(name)}
        if (method, rest) == ("PUT", ""):
            self.client.create_collection(name, VectorParams(**body["vectors"]))
            return 200, True
        if (method, rest) == ("GET", ""):
            return 200, json.loads(self.client.get_collection(name).model_dump_json())
        if (method, rest) == ("PUT", "/points"):
            if len(self.bodies) >= self.most:
                return 503, None
            self.bodies.append(size)
            self.client.upsert(name, [PointStruct(**point) for point in body["points"]])
            return 200, {"operation_id": 0, "status": "completed"}
        if (method, rest) == ("POST", "/points/scroll"):
            points, _ = self.client.scroll(name, Filter(**body["filter"]), limit=body["limit"])
            return 200, {"points": [json.loads(point.model_dump_json()) for point in points], "next_page_offset": None}
        return 404, None
