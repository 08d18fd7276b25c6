"""Bodies of requests: their structure, JSON, forms and uploaded files."""
