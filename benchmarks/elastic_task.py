"""The task that both sides of `benchmarks.elastic` train."""

from __future__ import annotations

WIDTH = 0.25
GLOBAL_SIZE = 256
MICRO_SIZE = 64
