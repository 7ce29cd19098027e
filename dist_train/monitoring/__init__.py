"""Observers of a run: console, log files, TensorBoard and trackers, and the exporter that Prometheus scrapes."""
