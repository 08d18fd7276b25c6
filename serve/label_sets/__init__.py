"""Label sets of the endpoint: registered ones and cached ones."""
