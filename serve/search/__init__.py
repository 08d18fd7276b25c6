"""Search in a finished output of `sightline tag`: the output, its index, the queue, and the look for new commits."""
