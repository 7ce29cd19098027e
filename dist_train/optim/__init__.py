"""Noise, averages of the weights, the learning rate, the optimizers, and the flat buffer of all weights."""
