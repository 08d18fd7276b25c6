"""The images that `sightline demo` renders, and that tests use."""
