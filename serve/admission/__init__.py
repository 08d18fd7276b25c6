"""Admission: API keys, rate limits, what is in flight, batches."""
