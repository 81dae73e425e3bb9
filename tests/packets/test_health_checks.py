"""Health-check node ports of tenants, asked from outside with real packets while their Services change."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vcproxy.lab import Client, HttpReply, Lab, Node, Pod, Refused, http_get
from vcproxy.lab.cluster import Cluster, endpoint_slice, service
from vcproxy.lab.dial import Failure

pytestmark = pytest.mark.packets

TENANTS = {"acme": False, "globex": False, "inlay": True}
"""Name, and whether it has a network of its own."""
PORT, OTHER_PORT = 32000, 32001
PORTS = [("http", "TCP", 80, 8080), ("ask", "UDP", 80, 8080)]
TARGETS = [("http", "TCP", 8080), ("ask", "UDP", 8080)]
VIPS = ("10.96.0.10", "fd00:96::10")
READY = {"ready": True, "serving": True, "terminating": False}
TERMINATING = {"ready": False, "serving": True, "terminating": True}
UNREADY = {"ready": False, "serving": False, "terminating": False}


class Scene:
    """Two nodes, an endpoint of every tenant on each, and somebody outside."""

    def __init__(self, lab: Lab, cluster: Cluster) -> None:
        self.cluster = cluster
        self.nodes: dict[str, Node] = {name: lab.node(name) for name in ("one", "two")}
        self.outside: Client = lab.client("outside", "192.168.77.200", "fd77::200")
        self.pods: dict[str, list[Pod]] = {}
        overlays = []
        for number, (tenant, overlay) in enumerate(TENANTS.items(), start=2):
            network = lab.overlay_tenant(tenant, vni=100 + number) if overlay else None
            overlays += [network] if network else []
            pods = self.pods[tenant] = []
            for at, place in enumerate(self.nodes.values(), start=1):
                ip4, ip6 = f"10.200.{at}.{number}", f"fd00:200:0:{at}::{number}"
                name = f"web-{place.name}"
                pods.append(
                    place.overlay_pod(network, name, ip4, ip6)
                    if network
                    else place.flat_pod(f"{tenant}/{name}", ip4, ip6)
                )
            self.cluster.apply(tenant, "pods", [_pod(pod) for pod in pods])
        cluster.start_brain()
        for place in self.nodes.values():
            # Without Node objects: node ports are accepted on addresses of the fabric.
            cluster.start_agent(place, overlays, nodePortAddresses=["192.168.77.0/24", "fd77::/64"])

    def publish(
        self,
        tenant: str,
        conditions: Mapping[str, Mapping[str, bool]],
        *,
        port: int = PORT,
        node_ports: tuple[int, int] = (30080, 30081),
        policy: str = "Local",
    ) -> None:
        """Make this the tenant's only Service: its endpoints' conditions by node."""
        made = service(
            "web",
            VIPS,
            PORTS,
            type="LoadBalancer",
            externalTrafficPolicy=policy,
            healthCheckNodePort=port,
        )
        for one, number in zip(made["spec"]["ports"], node_ports, strict=True):
            one["nodePort"] = number
        slices = []
        for family in ("IPv4", "IPv6"):
            built = endpoint_slice("web", family, [], TARGETS)
            built["endpoints"] = [
                {
                    "addresses": [pod.ip4 if family == "IPv4" else pod.ip6],
                    "conditions": dict(conditions[pod.node]),
                    "nodeName": pod.node,
                }
                for pod in self.pods[tenant]
                if pod.node in conditions
            ]
            slices.append(built)
        self.cluster.apply(tenant, "services", [made, *slices])

    def dial(self, node: str, port: int, family: int) -> HttpReply | Failure:
        place = self.nodes[node]
        return http_get(self.outside, place.ip4 if family == 4 else place.ip6, port)

    def ask(self, node: str, port: int = PORT, *, family: int = 4) -> HttpReply | Refused:
        said = self.dial(node, port, family)
        assert isinstance(said, HttpReply | Refused), said
        return said

    def becomes(self, node: str, wanted: int | None, *, port: int = PORT) -> None:
        """Wait until a node answers so, to both families, for a Service of that count; None: nobody listens."""

        def answered() -> bool:
            if wanted is None:  # a connection that was accepted right before the port closed is broken, and no answer
                return [self.dial(node, port, family) for family in (4, 6)] == [Refused()] * 2
            said = [self.ask(node, port, family=family) for family in (4, 6)]
            return all(_said(answer) == (200 if wanted else 503, wanted) for answer in said)

        self.cluster.wait(f"node {node} says {wanted} on port {port}", answered)

    def problems(self, node: str) -> list[str]:
        return [row["problem"] for row in self.cluster.ask(node)["problems"]]


def _said(answer: HttpReply | Refused) -> tuple[int, int] | None:
    if isinstance(answer, Refused):
        return None
    body = json.loads(answer.body)
    assert body["service"] == {"namespace": "default", "name": "web"}
    assert body["serviceProxyHealthy"] is True
    assert answer.headers["X-Load-Balancing-Endpoint-Weight"] == str(body["localEndpoints"])
    return answer.status, body["localEndpoints"]


def _pod(pod: Pod) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": pod.name.rpartition("/")[2], "namespace": "default"},
        "spec": {"nodeName": pod.node, "containers": []},
        "status": {"phase": "Running", "podIP": pod.ip4, "podIPs": [{"ip": pod.ip4}, {"ip": pod.ip6}]},
    }


@contextmanager
def scenes(directory: Path, *, granted: bool) -> Iterator[Scene]:
    """A running scene, in which tenants are granted node ports or are not."""
    sources = [{"directory": {"path": str(directory / "tenants")}}]
    brain = {"tenants": {"sources": sources, "policy": {"nodePorts": granted}}}
    with Lab("vcp-hc") as lab, Cluster(directory, brain=brain) as cluster:
        yield Scene(lab, cluster)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scenes(tmp_path_factory.mktemp("health"), granted=True) as made:
        yield made


def test_a_tenants_health_check_node_port(scene: Scene) -> None:
    scene.publish("acme", {"one": READY, "two": READY})
    for one, two, told_one, told_two in (
        (READY, READY, 1, 1),
        (TERMINATING, READY, 0, 1),
        (UNREADY, READY, 0, 1),
        (READY, TERMINATING, 1, 0),
    ):
        scene.publish("acme", {"one": one, "two": two})
        scene.becomes("one", told_one)
        scene.becomes("two", told_two)
    scene.publish("acme", {"two": READY})
    scene.becomes("one", 0)
    # The port changes, and what was dialled before is closed.
    scene.publish("acme", {"one": READY}, port=OTHER_PORT)
    scene.becomes("one", 1, port=OTHER_PORT)
    scene.becomes("one", None)
    scene.publish("acme", {"one": READY}, policy="Cluster", port=OTHER_PORT)
    scene.becomes("one", None, port=OTHER_PORT)


def test_who_has_a_port_keeps_it(scene: Scene) -> None:
    scene.publish("acme", {"one": READY})
    scene.becomes("one", 1)
    scene.publish("globex", {"one": READY}, node_ports=(30090, 30091))
    told = scene.cluster.wait("it is shown", lambda: [text for text in scene.problems("one") if "dir-globex" in text])
    assert told[0].startswith(f"tenant dir-globex: Service default/web: health-check node port {PORT}: listen ")
    assert "Address already in use" in told[0]
    scene.publish("acme", {"one": READY}, port=OTHER_PORT)
    scene.becomes("one", 1, port=OTHER_PORT)
    scene.becomes("one", 1)  # the other tenant's, a second later
    scene.cluster.wait("nothing is left to say", lambda: not scene.problems("one"))


def test_a_tenant_whose_network_nobody_outside_reaches_has_no_endpoints_to_tell_of(scene: Scene) -> None:
    scene.publish("inlay", {"one": READY}, port=32010, node_ports=(30100, 30101))
    scene.becomes("one", 0, port=32010)


def test_a_restarted_agent_answers_before_any_brain_speaks(scene: Scene) -> None:
    scene.publish("acme", {"one": READY}, port=OTHER_PORT)
    scene.becomes("one", 1, port=OTHER_PORT)
    # The last good state is written a second after a commit; an agent that is asked to end writes it at once.
    scene.cluster.stop()
    assert scene.ask("one", OTHER_PORT) == Refused()
    scene.cluster.start_agent(scene.nodes["one"])
    scene.becomes("one", 1, port=OTHER_PORT)


def test_a_tenant_without_node_ports_has_none(tmp_path: Path) -> None:
    with scenes(tmp_path, granted=False) as made:
        made.publish("acme", {"one": READY, "two": READY})
        refused = made.cluster.wait(
            "the guard has looked", lambda: made.cluster.ask("brain", "/refusals", tenant="acme")
        )
        assert {row["field"] for row in refused} == {"spec.healthCheckNodePort", "spec.ports[].nodePort"}
        made.cluster.wait_committed("one", "dir-acme")
        assert made.ask("one") == Refused()
