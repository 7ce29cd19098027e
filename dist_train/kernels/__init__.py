"""Fused kernels as torch operators: Triton's for GPUs, compiled ones for CPUs. No other package imports Triton."""
