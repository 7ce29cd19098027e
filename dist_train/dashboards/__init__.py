"""Grafana's dashboards as code. `python -m dist_train.dashboards DIRECTORY` writes them as JSON."""
