"""What makes labels trustworthy: a house of its own on top of `siglip` and what `pipelines` wrote."""
