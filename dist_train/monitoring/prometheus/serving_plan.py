"""Where and how a run's metrics are served: what the exporter's process needs of the settings."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # its import would cost the exporter's process half of its memory
    from dist_train.config.sections import MetricsSettings

_EVERY_INTERFACE = "0.0.0.0"  # nosec B104
_EVERYWHERE = frozenset({"", _EVERY_INTERFACE, "::"})


@dataclass(frozen=True)
class ServingPlan:
    """The settings `metrics.*` of the same names; paths are absolute."""

    host: str
    port: int
    token_file: Path | None = None
    password_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    targets_directory: Path | None = None
    advertised_host: str | None = None
    pushgateway: str | None = None
    last_scrape_seconds: float = 0.0

    @property
    def scheme(self) -> str:
        """Return the scheme of the address."""
        return "https" if self.certificate_file else "http"

    def host_for_others(self, node: str) -> str:
        """Return the host by which others reach the node called `node`; in brackets where that is IPv6."""
        host = self.advertised_host or ((node or socket.gethostname()) if self.host in _EVERYWHERE else self.host)
        return f"[{host}]" if ":" in host else host


def plan_of(settings: MetricsSettings) -> ServingPlan:
    """Return what the exporter's process needs of `settings`."""

    def absolute(path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().absolute()

    return ServingPlan(
        host=settings.host,
        port=settings.port,
        token_file=absolute(settings.token_file),
        password_file=absolute(settings.password_file),
        certificate_file=absolute(settings.certificate_file),
        key_file=absolute(settings.key_file),
        targets_directory=absolute(settings.targets_directory),
        advertised_host=settings.advertised_host,
        pushgateway=settings.pushgateway,
        last_scrape_seconds=settings.last_scrape_seconds,
    )
