"""A minute of changes to a thousand Services under load: not one connection to an endpoint that lives may fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.churn import RATE, churn, scene, vcproxy

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(300)]


def test_no_connection_fails_while_a_thousand_services_change(tmp_path: Path) -> None:
    with scene(tmp_path) as found:
        seen = churn(found, "vcproxy", vcproxy(found, tmp_path), tmp_path)
    assert seen.failures == {}, (seen.inside.first_failures, seen.outside.first_failures)
    assert seen.connections > 10_000
    assert seen.changes > 30 * RATE, "the API server took too few changes to prove anything"
    assert len(seen.late) > 20
