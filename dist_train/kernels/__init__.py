"""GPU kernels written in Triton, as torch operators. No other package imports Triton."""
