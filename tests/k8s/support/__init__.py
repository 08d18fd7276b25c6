"""Shared by the tests of `k8s/`: schemas, an API server, controllers, pods in network namespaces."""
