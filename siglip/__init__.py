"""SigLIP alone: images and texts to embeddings, labels and scores. Knows no Ray, no object store, no HTTP."""
