"""The page on which people search, filter and select the images of an output: `sightline browse`."""
