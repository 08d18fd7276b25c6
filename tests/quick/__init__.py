"""Tests that need nothing but the package: no Ray, no server, no system package. `make quick` runs them."""
