"""What moves the weights: noise, the learning rate, the optimizers."""
