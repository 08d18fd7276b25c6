"""Images on the web, which lists name by http(s) URLs."""
