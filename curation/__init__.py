"""Label curation on finished outputs: sample, review, calibrate, probe, evaluate, retag, report and diff.

Reads what `sightline tag` wrote. Only `retag` uses Ray, and no module reads the images themselves.
"""
