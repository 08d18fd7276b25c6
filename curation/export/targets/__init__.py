"""The targets of `sightline export`, a module for each: see `curation.export.job.Target`."""
