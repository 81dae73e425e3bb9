"""vcproxy as it is deployed: the image of the Dockerfile, brain and agents from deploy/, a cluster with kubelets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from e2e import objects
from e2e.cluster import images, rootfs
from e2e.cluster.cluster import CACHE, Cluster
from e2e.cluster.deployed import NAMESPACE
from e2e.cluster.pods import create
from e2e.cluster.scene import PORT, Scene, reaches, roll, scene_of
from e2e.controlplane import ControlPlane
from e2e.relay import Relay
from vcproxy.lab.dial import Reply, tcp_request

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(600)]


@dataclass
class Tenants:
    """A scene, and a tenant `acme` with an API server of its own."""

    scene: Scene
    acme: ControlPlane


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    """deploy/brain.yaml and deploy/node.yaml."""
    directory = tmp_path_factory.mktemp("split")
    (directory / "cluster").mkdir()
    with ExitStack() as stack:
        plane = stack.enter_context(ControlPlane("acme", directory / "acme", service_cidrs=("10.32.0.0/16",)))
        tenants = {"acme": plane.kubeconfig.read_bytes()}
        cluster = stack.enter_context(Cluster(directory / "cluster", proxy="split", tenants=tenants))
        # The brain runs on the first node, in its network.
        stack.enter_context(Relay(cluster.nodes[0].machine.ns, int(plane.url.rpartition(":")[2])))
        yield Tenants(stack.enter_context(scene_of(cluster)), plane)


def test_services_of_cluster_and_tenant(split: Tenants) -> None:
    scene, cluster = split.scene, split.scene.cluster
    for node in cluster.nodes:
        for address in node.addresses.addresses:
            assert isinstance(tcp_request(cluster.control.machine, address, scene.node_port), Reply)
    shop = scene.serve("shop", 2, **{"vcproxy.dev/tenant": "acme"})
    buyer = create(cluster, "buyer", cluster.nodes[1], labels={"vcproxy.dev/tenant": "acme"})
    service = objects.service("shop", ports=[objects.service_port(80, target=PORT)], cluster_ips=["10.32.0.10"])
    split.acme.client.create(service)
    ends = objects.endpoint_slice("shop-1", service="shop", endpoints=[shop.addresses[0]], ports=[PORT])
    split.acme.client.create(ends)
    reaches(buyer, "10.32.0.10", 80, pod="shop")
    assert not isinstance(tcp_request(scene.client, "10.32.0.10", 80, timeout=0.5), Reply), (
        "the tenant's Service leaked"
    )
    # A tenant's pod is in the tenant's zone: Services of the cluster that owns the node are not its own, and what it
    # sends there goes on to where nobody has the address.
    assert not isinstance(tcp_request(buyer, scene.web[0], 80, timeout=0.5), Reply)


def test_rolling_updates_of_agents_and_brain_break_no_connection(split: Tenants) -> None:
    roll(split.scene, NAMESPACE, "daemonset/vcproxy-node", "deployment/vcproxy-brain")


def test_a_build_step_cannot_write_to_the_host(tmp_path: Path) -> None:
    watched = [Path(path) for path in ("/etc/resolv.conf", "/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf")]
    before = _digests(watched)
    root = tmp_path / "root"
    rootfs.copy(images.base(CACHE), root)
    for path in (*map(str, watched), "/run/host-authorities.pem", "/proc/sys/net/ipv4/ip_forward", "/dev/odd"):
        try:
            rootfs.run(root, ["sh", "-ec", f'mkdir -p "$(dirname {path})"; echo overwritten > {path}'])
        except rootfs.BuildFailed as error:
            assert "ead-only" in str(error) or "Permission denied" in str(error)
    assert _digests(watched) == before
    assert not Path("/dev/odd").exists()
    assert not Path("/run/host-authorities.pem").exists()


def _digests(paths: list[Path]) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.exists()}
