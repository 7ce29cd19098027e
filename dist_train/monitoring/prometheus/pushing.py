"""The last values of a run, handed to a Pushgateway: for runs that end before anyone scrapes them."""

from __future__ import annotations

from threading import Thread

from prometheus_client import CollectorRegistry, push_to_gateway

from dist_train.monitoring.prometheus.board import Snapshot
from dist_train.monitoring.prometheus.metric import Metric
from dist_train.monitoring.prometheus.registry import registry_of

PUSH_SECONDS = 5.0
JOB = "dist_train"


class Push:
    """One push in the background. A run's own group is replaced: job and run, and the rank other than 0."""

    def __init__(self, gateway: str, metrics: tuple[Metric, ...], now: Snapshot) -> None:
        """Begin to push `metrics` of `now` to the Pushgateway at the URL `gateway`."""
        self._gateway = gateway
        self._reason = f"no answer within {PUSH_SECONDS:g} s"
        self._group = {"run": now.facts.name}
        if now.facts.rank:
            self._group["rank"] = str(now.facts.rank)
        self._thread = Thread(target=self._push, args=(registry_of(metrics, now),), name="push", daemon=True)
        self._thread.start()

    def warning(self, seconds: float = PUSH_SECONDS) -> str | None:
        """Wait for the end of the push, for so many seconds at most; return what went wrong, if anything did."""
        self._thread.join(seconds)
        if not self._reason:
            return None
        return f"the Pushgateway at {self._gateway} did not take the last values: {self._reason}"

    def _push(self, registry: CollectorRegistry) -> None:
        try:
            push_to_gateway(self._gateway, JOB, registry, grouping_key=self._group, timeout=PUSH_SECONDS)
        except Exception as error:  # urllib lets through whatever a broken server provokes
            self._reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        else:
            self._reason = ""
