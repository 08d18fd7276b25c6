"""Unmodified clients against `sightline serve` with an API key. `docs/clients.md` lists their calls."""
