"""The batch job's output: schema, parts, commits, fingerprint, verification."""
