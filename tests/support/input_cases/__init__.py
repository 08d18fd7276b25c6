"""Kinds of input and what a job does with each: the cases behind `docs/inputs.md`, a module for each section."""
