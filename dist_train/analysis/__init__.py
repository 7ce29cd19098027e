"""The loss around a run's weights: landscapes and sharpness, computed from its checkpoints."""
