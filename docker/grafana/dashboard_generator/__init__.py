"""Grafana's dashboards as code. `python -m dashboard_generator DIRECTORY` writes them as JSON."""
