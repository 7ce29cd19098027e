"""Kernels for GPUs, written in Triton, as operators of torch; nothing else imports it."""
