"""Arrays to embeddings: what the model sees of each modality."""
