"""What follows a finished output: search, label curation (sample, review, calibrate, probe, ...), and export.

Reads what `sightline tag` wrote. Only `retag` uses Ray. Only `review` and `export` read the images themselves.
"""
