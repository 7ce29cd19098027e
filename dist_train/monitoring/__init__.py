"""Observers of a run: the console, log files, TensorBoard, and the exporter that Prometheus scrapes."""
