"""The endpoint's logger. Below Ray Serve's, whose handlers write JSON with the request id into the replica's log file:
a logger of any other name reaches no handler there, and its messages are seen by nobody."""

import logging

log = logging.getLogger("ray.serve.sightline")
