"""Prometheus monitoring of a run: the exporter, in its own process, its metrics, and its target file."""
