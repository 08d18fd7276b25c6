"""Object stores (local folders, S3) and YAML settings. This package knows nothing of images or models."""
