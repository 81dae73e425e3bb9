"""vcproxy as it is deployed: the image of the Dockerfile, the manifests of deploy/, a cluster with kubelets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from e2e import objects
from e2e.cluster import images, rootfs, upstream
from e2e.cluster.cluster import CACHE, Cluster
from e2e.cluster.deployed import NAMESPACE, rolled_out
from e2e.cluster.pods import Pod, create
from e2e.controlplane import ControlPlane
from e2e.polling import eventually
from e2e.relay import Relay
from vcproxy.lab.dial import Place, Refused, Reply, TimedOut, tcp_request
from vcproxy.lab.load import Load
from vcproxy.lab.servers import Servers

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(900)]

PORT = 8080
NODE_PORT = 30080


@dataclass
class Scene:
    """A cluster, a Service `web` in it, and a tenant with a Service of its own."""

    cluster: Cluster
    tenant: ControlPlane
    servers: Servers
    web: list[Pod] = field(default_factory=list)

    @property
    def cluster_ips(self) -> list[str]:
        ips: list[str] = self.cluster.control.client.get("Service", "web", "default").object["spec"]["clusterIPs"]
        return ips

    def serve(self, name: str, node: int, **labels: str) -> Pod:
        """A pod that answers with its name."""
        pod = create(self.cluster, name, self.cluster.nodes[node], labels=labels)
        self.servers.serve(name, ns=pod.ns, addresses=pod.addresses, tcp=[PORT], udp=[PORT])
        return pod


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("deployed")
    (directory / "cluster").mkdir()
    with ExitStack() as stack:
        plane = stack.enter_context(ControlPlane("acme", directory / "acme", service_cidrs=("10.32.0.0/16",)))
        tenants = {"acme": plane.kubeconfig.read_bytes()}
        cluster = stack.enter_context(Cluster(directory / "cluster", proxy="split", tenants=tenants))
        # The brain runs on the first node, in its network.
        stack.enter_context(Relay(cluster.nodes[0].machine.ns, int(plane.url.rpartition(":")[2])))
        servers = Servers()
        stack.callback(servers.close)
        made = Scene(cluster, plane, servers)
        for number in range(3):
            made.web.append(made.serve(f"web-{number}", number, app="web"))
        ports = [
            objects.service_port(80, name="tcp", target=PORT, node_port=NODE_PORT),
            objects.service_port(80, name="udp", protocol="UDP", target=PORT),
        ]
        cluster.control.client.create(
            objects.service("web", type="NodePort", ports=ports, selector={"app": "web"}, dual_stack=True)
        )
        yield made


def reaches(place: Place, address: str, port: int, *, pod: str = "") -> None:
    """Wait until somebody answers there: `pod`, or anybody."""

    def answers() -> bool:
        found = tcp_request(place, address, port)
        return isinstance(found, Reply) and found.pod.startswith(pod)

    eventually(answers, within=30.0, what=f"an answer of {pod or 'anybody'} at {address} port {port}")


def test_services_of_cluster_and_tenant(scene: Scene) -> None:
    client = create(scene.cluster, "client", scene.cluster.nodes[1])
    for address in scene.cluster_ips:
        reaches(client, address, 80)
    for node in scene.cluster.nodes:
        for address in node.addresses.addresses:
            assert isinstance(tcp_request(scene.cluster.control.machine, address, NODE_PORT), Reply)

    shop = scene.serve("shop", 2, **{"vcproxy.dev/tenant": "acme"})
    buyer = create(scene.cluster, "buyer", scene.cluster.nodes[1], labels={"vcproxy.dev/tenant": "acme"})
    service = objects.service("shop", ports=[objects.service_port(80, target=PORT)], cluster_ips=["10.32.0.10"])
    scene.tenant.client.create(service)
    scene.tenant.client.create(
        objects.endpoint_slice("shop-1", service="shop", endpoints=[shop.addresses[0]], ports=[PORT])
    )
    reaches(buyer, "10.32.0.10", 80, pod="shop")
    assert not isinstance(tcp_request(client, "10.32.0.10", 80, timeout=0.5), Reply), "the tenant's Service leaked"
    # A tenant's pod is in the tenant's zone: Services of the cluster that owns the node are not its own.
    assert isinstance(tcp_request(buyer, scene.cluster_ips[0], 80, timeout=0.5), Refused | TimedOut)


def test_rolling_updates_break_no_connection(scene: Scene) -> None:
    """Agents and brain are replaced node by node, while pods, nodes and clients from outside go on connecting."""
    control = scene.cluster.control
    client = create(scene.cluster, "loader", scene.cluster.nodes[2])
    inside = [(protocol, address, 80) for protocol in ("tcp", "udp") for address in scene.cluster_ips]
    outside = [("tcp", address, NODE_PORT) for node in scene.cluster.nodes for address in node.addresses.addresses]
    for protocol, address, port in inside:
        if protocol == "tcp":
            reaches(client, address, port)
    with (
        Load(client, inside, timeout=5.0, seconds=300.0) as from_pod,
        Load(scene.cluster.nodes[0].machine, inside[:2], timeout=5.0, seconds=300.0) as from_node,
        Load(control.machine, outside, timeout=5.0, seconds=300.0) as from_outside,
    ):
        for what in ("daemonset/vcproxy-node", "deployment/vcproxy-brain"):
            before = _pods(scene)
            control.kubectl("-n", NAMESPACE, "rollout", "restart", what)
            rolled_out(control, NAMESPACE, what)
            assert before != _pods(scene)
    for load in (from_pod, from_node, from_outside):
        assert load.result.failures == {}, load.result.first_failures
        assert load.result.count > 1000

    # And the new ones follow what happens.
    scene.serve("late", 0, app="web")
    reaches(client, scene.cluster_ips[0], 80, pod="late")


def _pods(scene: Scene) -> set[str]:
    return {pod["metadata"]["uid"] for pod in scene.cluster.control.client.list("Pod", NAMESPACE).items}


def test_upstreams_tests_pass_with_the_daemonset(tmp_path: Path) -> None:
    """deploy/run.yaml in kube-proxy's place, and what of upstream's tests fits into some minutes."""
    (tmp_path / "cluster").mkdir()
    with Cluster(tmp_path / "cluster", proxy="run") as cluster:
        results = upstream.run(cluster, tmp_path / "tests", skip=[r"\[Slow\]"], minutes=13)
        rolled_out(cluster.control, "kube-system", "daemonset/vcproxy-run")
    assert [result for result in results if result.status == "failed"] == []
    assert sum(result.status == "passed" for result in results) > 100


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
