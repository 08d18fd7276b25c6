"""`python -m sightline`: the same as the command `sightline`."""

from sightline.start import main

main()
