"""The training loop, and the update that it repeats: Algorithm 1 over the global batch."""
