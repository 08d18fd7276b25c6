"""An index of an output's embeddings, for repeated searches, that grows with the output."""
