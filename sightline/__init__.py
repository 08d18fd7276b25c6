"""Image tagging and embedding with SigLIP on Ray: the command line and the Python API."""

from sightline.imports import install_finder

install_finder()
