"""What runs the unmodified clients of `tests/clients`, and the page that says what each of them can do."""
