"""A page to look at: what is in an output, label by label, in one file that needs no network."""
