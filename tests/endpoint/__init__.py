"""Tests of the endpoint in this process, over a real socket and without Ray."""
