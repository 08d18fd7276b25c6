"""Fetching from the web, protected against server-side request forgery (SSRF). The endpoint and the job both use it."""
