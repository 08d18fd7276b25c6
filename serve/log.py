"""The endpoint's logger, below Ray Serve's: Ray Serve's handlers add the request id and write the replica's log file.

In a replica, a logger of any other name reaches no handler, and its messages are lost.
"""

import logging

from serve.rayserve.internals import LOGGER

log = logging.getLogger(f"{LOGGER}.sightline")
