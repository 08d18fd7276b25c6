"""Tests of the batch job and of the curation commands on a real Ray."""
