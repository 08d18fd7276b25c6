"""Export of a finished output to the formats of other tools: datasets, tables for search, annotations, sidecars."""
