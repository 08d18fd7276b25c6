"""Runs the functions of the other files here: one JSON line on stdin for each call, one on stdout for its result.

A call is {program, name, options}. A result is {value}, or {error} with what the client's own exception has.
"""

import importlib
import json
import os
import sys
from typing import Any


def describe(error: BaseException) -> dict[str, Any]:
    """What a test asserts of an exception. None where the exception has no such attribute."""
    response = getattr(error, "response", None)
    headers = getattr(error, "headers", None) or getattr(response, "headers", None) or {}
    return {
        "type": type(error).__name__,
        "message": str(error),
        "status": getattr(error, "status_code", None),
        "code": getattr(error, "code", None),
        "param": getattr(error, "param", None),
        "body": str(getattr(error, "body", None) or ""),
        "retry_after": headers.get("retry-after") if hasattr(headers, "get") else None,
    }


def main() -> None:
    """Answer calls until stdin ends. What the clients print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        call = json.loads(line)
        try:
            function = getattr(importlib.import_module(call["program"]), call["name"])
            reply = {"value": function(**call["options"])}
        except Exception as error:  # every client has its own types
            reply = {"error": describe(error)}
        replies.write(json.dumps(reply, default=list) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
