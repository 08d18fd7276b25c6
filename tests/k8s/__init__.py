"""Tests of `k8s/`: the rendered manifests, the network policies, the image, and runs on imitated clusters."""
