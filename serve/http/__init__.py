"""HTTP: middleware, bodies, errors and responses."""
