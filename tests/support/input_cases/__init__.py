"""Kinds of input and what a job does with each: the cases behind `docs/inputs.md`. A section of the page is a module."""
