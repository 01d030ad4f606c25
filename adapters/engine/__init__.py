"""One call under a pruner: what its prompt brings, what is kept of it, and the decoder that runs on that."""
