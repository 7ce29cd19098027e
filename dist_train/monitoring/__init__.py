"""What is observed of a run: records, and who takes them (console, JSON lines, logs, Prometheus)."""
