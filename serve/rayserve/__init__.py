"""The endpoint's code that knows Ray Serve: model replicas, handles, HAProxy, metrics, private names."""
