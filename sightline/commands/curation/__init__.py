"""The commands that use and improve the labels of a finished output."""
