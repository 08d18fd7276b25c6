"""What a format's files need beyond Pillow: variants that it reads wrongly, and blocks that must not cost an image."""
