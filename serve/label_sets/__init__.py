"""Label sets of the endpoint: those of the configuration, their files, and those that requests bring along."""
