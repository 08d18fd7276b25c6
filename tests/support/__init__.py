"""What several folders' tests share."""
