"""Meta-test above the networks: models, scores on disk, results, plots, published numbers."""
