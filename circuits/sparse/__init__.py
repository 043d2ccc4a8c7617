"""Weight-sparse transformers (Gao et al. 2025): data, model, training, pruning to circuits."""
