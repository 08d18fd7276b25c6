"""The stages of the batch job's dataset: reader, tagger, sink."""
