"""A cluster with a Service that answers, for tests of what must not disturb it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from e2e import objects
from e2e.cluster.cluster import Cluster
from e2e.cluster.deployed import rolled_out
from e2e.cluster.pods import Pod, create
from e2e.polling import eventually
from vcproxy.lab.dial import Place, Reply, tcp_request
from vcproxy.lab.load import Load
from vcproxy.lab.servers import Servers

PORT = 8080
"""What pods that serve listen on."""


@dataclass
class Scene:
    """A cluster with a Service `web`, dual stack, TCP and UDP, one pod on each node, and a client pod on the last."""

    cluster: Cluster
    servers: Servers
    client: Pod
    web: tuple[str, ...]
    node_port: int

    def serve(self, name: str, node: int, **labels: str) -> Pod:
        """A pod that answers with its name."""
        pod = create(self.cluster, name, self.cluster.nodes[node], labels=labels)
        self.servers.serve(name, ns=pod.ns, addresses=pod.addresses, tcp=[PORT], udp=[PORT])
        return pod


@contextmanager
def scene_of(cluster: Cluster) -> Iterator[Scene]:
    """A scene in a cluster that has others before and after: nothing of it stays."""
    client = cluster.control.client
    with Servers() as servers:
        ports = [
            objects.service_port(80, name="tcp", target=PORT),
            objects.service_port(80, name="udp", protocol="UDP", target=PORT),
        ]
        service = objects.service("web", type="NodePort", ports=ports, selector={"app": "web"}, dual_stack=True)
        spec = client.create(service).object["spec"]
        try:
            dialler = create(cluster, "client", cluster.nodes[-1])
            scene = Scene(cluster, servers, dialler, tuple(spec["clusterIPs"]), spec["ports"][0]["nodePort"])
            for number, _ in enumerate(cluster.nodes):
                scene.serve(f"web-{number}", number, app="web")
            for address in scene.web:
                reaches(scene.client, address, 80)
            yield scene
        finally:
            client.delete("Service", "web", "default")
            client.delete_all("Pod", "default")


def reaches(place: Place, address: str, port: int, *, pod: str = "") -> None:
    """Wait until somebody answers there: `pod`, or anybody."""

    def answers() -> bool:
        found = tcp_request(place, address, port)
        return isinstance(found, Reply) and found.pod.startswith(pod)

    eventually(answers, within=30.0, what=f"an answer of {pod or 'anybody'} at {address} port {port}")


def roll(scene: Scene, namespace: str, *workloads: str) -> None:
    """Replace all pods of these workloads, node by node, while pods, a node and a client outside go on connecting."""
    cluster, control = scene.cluster, scene.cluster.control
    inside = [(protocol, address, 80) for protocol in ("tcp", "udp") for address in scene.web]
    outside = [("tcp", address, scene.node_port) for node in cluster.nodes for address in node.addresses.addresses]

    def pods() -> set[str]:
        return {pod["metadata"]["uid"] for pod in control.client.list("Pod", namespace).items}

    with (
        Load(scene.client, inside, timeout=5.0, seconds=300.0) as from_pod,
        Load(cluster.nodes[0].machine, inside, timeout=5.0, seconds=300.0) as from_node,
        Load(control.machine, outside, timeout=5.0, seconds=300.0) as from_outside,
    ):
        for workload in workloads:
            before = pods()
            control.kubectl("-n", namespace, "rollout", "restart", workload)
            rolled_out(control, namespace, workload)
            assert before != pods()
    for load in (from_pod, from_node, from_outside):
        assert load.result.failures == {}, load.result.first_failures
        assert load.result.count > 1000
    # And the new ones follow what happens.
    late = scene.serve("late", 0, app="web")
    reaches(scene.client, scene.web[0], 80, pod=late.name)
