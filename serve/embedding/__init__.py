"""From checked inputs to embeddings: checks, queues and calls of the model."""
