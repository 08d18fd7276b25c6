"""The ground floor: the object store, and the reading of YAML settings. Knows nothing of images or models."""
