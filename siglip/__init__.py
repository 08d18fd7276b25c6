"""SigLIP: images and texts to embeddings, labels and scores. Knows nothing of Ray, object stores or HTTP."""
