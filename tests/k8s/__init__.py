"""Tests of `k8s/`: rendered manifests, network policies, the image, and runs on simulated clusters."""
