"""Servers, clients, clusters, checkpoints and images that the tests of several folders share."""
