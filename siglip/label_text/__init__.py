"""The text of labels: characters that cannot be seen, and lines of a text file that may be more than labels."""
