"""The upper limit of the endpoint with a tiny model: a FastAPI app on Ray Serve that only decodes an image.

python -m benchmarks.bare PORT
"""

import asyncio
import base64
import io
import logging
import signal
import sys
import threading

import ray
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel
from ray import serve as rayserve


class Body(BaseModel):
    """The body of the endpoint's requests. Only the image is used."""

    image: str
    label_set: str | None = None


def build_app() -> FastAPI:
    """Return the application. It is called in the replica."""
    app = FastAPI()

    def decode(data: bytes) -> int:
        image = Image.open(io.BytesIO(data)).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
        return len(image.tobytes())

    @app.post("/v1/classify")
    async def classify(body: Body) -> dict[str, int]:
        data = base64.b64decode(body.image.partition(",")[2])
        return {"bytes": await asyncio.to_thread(decode, data)}

    return app


if __name__ == "__main__":
    ray.init(address="local", num_cpus=16, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    rayserve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    rayserve.run(
        rayserve.deployment(
            rayserve.ingress(build_app)(), max_ongoing_requests=1024, logging_config={"enable_access_log": False}
        ).bind(),
        name="bare",
    )
    print("ready", flush=True)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    rayserve.shutdown()
    ray.shutdown()
