"""The training loop: one update after another, each of them Algorithm 1 over the global batch."""
