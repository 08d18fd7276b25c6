"""Options of other vendors' requests: the table of them, what each does, and reading them."""
