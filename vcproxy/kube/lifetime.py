"""How long credentials are good for: what a client certificate and a service account's token say of themselves.

Nothing is verified here. A token that lies about its end (a JWT, RFC 7519) deceives those who wrote it.
"""

from __future__ import annotations

import base64
import binascii
from typing import NamedTuple

import msgspec

from vcproxy.kube.kubeconfig import Credentials

LONGEST_NOTICE = 14 * 86_400.0
"""Seconds before the end that anybody needs to be told."""
_LAST = 253_402_300_799.0  # the end of the year 9999: what is later is not a time


class Lifetime(NamedTuple):
    """From when to when, in Unix seconds."""

    begins: float
    ends: float

    @property
    def notice(self) -> float:
        """When whoever renews them should have done so: a tenth of the lifetime before the end, or two weeks.

        Kubernetes renews tokens when a fifth of their lifetime is left, cert-manager certificates at a third.
        """
        return self.ends - min(LONGEST_NOTICE, max(0.0, (self.ends - self.begins) / 10))


def lifetime(credentials: Credentials) -> Lifetime | None:
    """Of what ends first; None: nothing has an end. A token in a file is renewed there, by somebody else."""
    found: list[Lifetime] = []
    if credentials.client_cert_pem:
        from cryptography import x509  # 8 MiB, for whoever has certificates

        certificate = x509.load_pem_x509_certificate(credentials.client_cert_pem)
        found.append(
            Lifetime(certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp())
        )
    if credentials.token and (said := _of_token(credentials.token)) is not None:
        found.append(said)
    return min(found, key=lambda one: one.ends, default=None)


class _Claims(msgspec.Struct):
    exp: float | None = None
    iat: float | None = None


def _of_token(token: str) -> Lifetime | None:
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = msgspec.json.decode(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)), type=_Claims)
    except (ValueError, binascii.Error, msgspec.DecodeError, RecursionError):
        return None
    if claims.exp is None or not 0 < claims.exp <= _LAST:
        return None
    return Lifetime(claims.exp if claims.iat is None else claims.iat, claims.exp)
