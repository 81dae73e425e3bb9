"""When credentials end, by their own word."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import pytest

from vcproxy.kube.kubeconfig import Credentials
from vcproxy.kube.lifetime import LONGEST_NOTICE, Lifetime, lifetime
from vcproxy.ops import pki

DAY = 86_400.0


def token(**claims: Any) -> str:
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in ({}, claims)]
    return ".".join([*parts, "signature"])


def credentials(*, days: int = 0, token: str = "") -> Credentials:
    pair = pki.Authority("test", days).client("admin") if days else pki.KeyPair(b"", b"")
    return Credentials("https://a:1", client_cert_pem=pair.certificate, client_key_pem=pair.key, token=token)


def test_of_a_certificate() -> None:
    found = lifetime(credentials(days=10))
    assert found is not None
    assert found.begins < time.time() and found.ends == pytest.approx(time.time() + 10 * DAY, abs=60)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (token(iat=1000, exp=4600), Lifetime(1000, 4600)),
        (token(exp=4600.5, sub="somebody"), Lifetime(4600.5, 4600.5)),
        (token(iat=1000), None),
        (token(exp="soon"), None),
        (token(exp=1e300), None),
        (token(exp=-1), None),
        ("opaque", None),
        ("a.b.c", None),
        ("..", None),
        ("a." + "!" * 99 + ".c", None),
        ("a." + base64.urlsafe_b64encode(b"[" * 100_000).decode() + ".c", None),
        ("", None),
    ],
)
def test_of_a_token(said: str, expected: Lifetime | None) -> None:
    assert lifetime(credentials(token=said)) == expected


def test_what_ends_first_counts() -> None:
    assert lifetime(credentials(days=10, token=token(iat=0, exp=3600))) == Lifetime(0, 3600)
    later = lifetime(credentials(days=10, token=token(iat=0, exp=time.time() + 99 * DAY)))
    assert later is not None and later.ends < time.time() + 11 * DAY


@pytest.mark.parametrize(
    ("found", "notice"),
    [
        (Lifetime(0, 3600), 3240),
        (Lifetime(0, 365 * DAY), 365 * DAY - LONGEST_NOTICE),
        (Lifetime(50, 50), 50),
        (Lifetime(100, 50), 50),
    ],
)
def test_notice_is_given_when_they_should_have_been_renewed(found: Lifetime, notice: float) -> None:
    assert found.notice == notice
