"""Credentials that were not renewed in time are shown."""

from __future__ import annotations

import structlog

from tests.unit.kube.test_lifetime import credentials, token
from vcproxy.brain.expiry import Expiries
from vcproxy.ops import metrics

METRIC = "vcproxy_tenant_credentials_expiry_timestamp_seconds"


def test_shown_from_a_tenth_of_the_lifetime_before_the_end_until_renewed() -> None:
    now = 0.0
    held = Expiries(lambda: now)
    held.put("dir-acme", credentials(token=token(iat=0, exp=3600)))
    held.put("dir-other", credentials(token="opaque"))
    assert (metrics.value(METRIC, {"tenant": "dir-acme"}), metrics.value(METRIC, {"tenant": "dir-other"})) == (3600, 0)
    with structlog.testing.capture_logs() as logs:
        held.tell()
        assert not held.problems() and not logs
        now = 3240.0
        for _ in range(2):
            held.tell()
        [problem] = held.problems()
        assert problem.subject == "tenant dir-acme"
        assert problem.message == "its credentials expire at 1970-01-01T01:00:00Z: renew its kubeconfig"
        assert [(said["log_level"], said["tenant"]) for said in logs] == [("warning", "dir-acme")]
        now = 3600.0
        assert held.problems()[0].message.startswith("its credentials have expired at 1970-01-01T01:00:00Z")
        held.put("dir-acme", credentials(token=token(iat=3600, exp=7200)))
        held.tell()
        assert not held.problems() and len(logs) == 1
        now = 7000.0
        held.tell()
        assert len(logs) == 2


def test_a_tenant_that_is_gone_is_forgotten() -> None:
    held = Expiries(lambda: 9999.0)
    held.put("dir-acme", credentials(token=token(exp=1)))
    held.forget("dir-acme")
    assert not held.problems() and metrics.value(METRIC, {"tenant": "dir-acme"}) == 0
    held.forget("dir-acme")


def test_credentials_without_an_end_replace_those_with_one() -> None:
    held = Expiries(lambda: 9999.0)
    held.put("dir-acme", credentials(token=token(exp=1)))
    held.put("dir-acme", credentials(token="opaque"))
    assert not held.problems()
    held.forget("dir-acme")
