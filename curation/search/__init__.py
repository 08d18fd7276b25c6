"""Search in a finished output: texts, images, conditions, and where the relevant images end."""
