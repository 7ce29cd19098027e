"""What Prometheus reads of a run: an exporter in a process of its own, its metrics, its target file."""
