"""deploy/run.yaml, vcproxy in kube-proxy's place, and what Kubernetes' own tests say of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster import upstream
from e2e.cluster.cluster import Cluster
from e2e.cluster.scene import roll, scene_of

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """deploy/run.yaml."""
    directory = tmp_path_factory.mktemp("alone")
    with Cluster(directory, proxy="run") as cluster:
        yield cluster


def test_a_rolling_update_in_kube_proxys_place_breaks_no_connection(alone: Cluster) -> None:
    with scene_of(alone) as scene:
        roll(scene, "kube-system", "daemonset/vcproxy-run")


def test_upstreams_tests_pass_with_the_daemonset(alone: Cluster, tmp_path: Path) -> None:
    """What of upstream's tests fits into some minutes."""
    results = upstream.run(alone, tmp_path / "tests", skip=[r"\[Slow\]"], minutes=13)
    assert [result for result in results if result.status == "failed"] == []
    assert sum(result.status == "passed" for result in results) > 100
