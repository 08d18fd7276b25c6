"""What needs nothing but the package: no Ray, no server, no system package. `make quick` runs these."""
