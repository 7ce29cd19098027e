"""What the weights that a run has found look like: landscapes and sharpness, from its checkpoints."""
