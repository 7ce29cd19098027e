"""Who may read the metrics: bearer token, user and password, TLS."""

from __future__ import annotations

import base64
import binascii
import hmac
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.monitoring.prometheus.serving_plan import ServingPlan, plan_of
from dist_train.outcome import UsageError

if TYPE_CHECKING:
    from dist_train.config.sections import MetricsSettings


@dataclass(frozen=True)
class Credentials:
    """What a scrape must bring: the token, or the `user:password`; nothing where both are None."""

    token: bytes | None = None
    login: bytes | None = None

    def admit(self, authorization: str) -> bool:
        """Return whether a request with this Authorization header may read."""
        if self.token is None and self.login is None:
            return True
        scheme, _, value = authorization.partition(" ")
        given = value.strip().encode("utf-8", "surrogateescape")
        match scheme.lower():
            case "bearer":
                return self.token is not None and hmac.compare_digest(given, self.token)
            case "basic":
                try:
                    login = base64.b64decode(given, validate=True)
                except binascii.Error:
                    return False
                return self.login is not None and hmac.compare_digest(login, self.login)
        return False

    @property
    def challenges(self) -> tuple[str, ...]:
        """The WWW-Authenticate headers of a refusal."""
        bearer = ('Bearer realm="dist_train"',) if self.token is not None else ()
        basic = ('Basic realm="dist_train", charset="UTF-8"',) if self.login is not None else ()
        return bearer + basic


def check_access(settings: MetricsSettings) -> None:
    """Check the files that access rests on. Raises UsageError where one is missing or not what it should be."""
    plan = plan_of(settings)
    read_credentials(plan)
    tls_context(plan)


def read_credentials(plan: ServingPlan) -> Credentials:
    """Return what a scrape must bring. Raises UsageError as `check_access`."""
    token = login = None
    if plan.token_file is not None:
        key = "metrics.token_file"
        token = _one_line(plan.token_file, key)
        if not all(33 <= byte <= 126 for byte in token):
            raise UsageError(
                f"{key}: the token in {plan.token_file} has characters that no HTTP header takes; "
                f"make one with: openssl rand -hex 32 > {plan.token_file}"
            )
    if plan.password_file is not None:
        key = "metrics.password_file"
        login = _one_line(plan.password_file, key)
        user, _, password = login.partition(b":")
        if not user or not password:
            raise UsageError(f"{key}: {plan.password_file} must hold user:password, on one line")
    return Credentials(token, login)


def tls_context(plan: ServingPlan) -> ssl.SSLContext | None:
    """Return what TLS is served with; None for plain HTTP. Raises UsageError as `check_access`."""
    certificate, key = plan.certificate_file, plan.key_file
    if certificate is None:
        if key is not None:
            raise UsageError("metrics.key_file needs metrics.certificate_file: name the certificate of this key")
        return None
    _content(certificate, "metrics.certificate_file")
    if key is not None:
        _content(key, "metrics.key_file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2

    def no_password() -> str:
        raise UsageError(
            f"metrics.key_file: the key in {key or certificate} is encrypted, and nobody is there to type its "
            f"password; decrypt it with: openssl pkey -in ENCRYPTED -out {key or certificate}"
        )

    try:
        context.load_cert_chain(certificate, key, password=no_password)
    except ssl.SSLError as error:
        raise UsageError(
            f"metrics.certificate_file: {certificate} and {key or 'the key in it'} cannot be used "
            f"({error.reason or error}); both must be PEM, the certificate before its chain, and the key its own"
        ) from error
    return context


def _one_line(path: Path, key: str) -> bytes:
    content = _content(path, key).strip()
    if not content:
        raise UsageError(f"{key}: {path} is empty; write the secret into it, on one line")
    if len(content.splitlines()) > 1:
        raise UsageError(f"{key}: {path} has more than one line; write the secret alone into it, on one line")
    return content


def _content(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{key}: {path} cannot be read ({error.strerror or error}); name a file that the trainer may read"
        ) from error
