"""The endpoint on Ray Serve: replicas, handles, HAProxy, metrics."""
