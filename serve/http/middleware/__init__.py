"""Everything that happens to a request before and after its route: one ASGI middleware for each concern."""
