"""Pictures, the HTML report, and embeddings."""
