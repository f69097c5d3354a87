"""autoprune.sparsity."""
