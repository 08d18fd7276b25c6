"""The report on an output: label statistics, charts and example images, in HTML files that load nothing else."""
