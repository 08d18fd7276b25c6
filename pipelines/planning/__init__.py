"""Planning: list the inputs, compare them with those that are planned, and pack new ones into shards."""
