"""Random Position Noise (arXiv 2212.05961) on a model's embeddings."""
