"""What the tests of `k8s/` share: schemas, an API server, controllers, pods in network namespaces."""
