"""A change of one Service is a change of its own elements: the kernel follows the API, and nothing else is touched.

Each test changes the Service `web` of tenant `acme`, or of the super cluster, step by step (e2e.scene).
"""

from __future__ import annotations

import pytest

from e2e.conftest import NamespaceFactory
from e2e.oracle import ANY_NODE, SUPER, Frontend
from e2e.scene import Scene
from e2e.traffic import REQUESTS
from e2e.world import PORT, TARGET, TARGETS, World, slices, uid_of, web
from vcproxy.lab import Reply

pytestmark = [pytest.mark.controlplane, pytest.mark.packets]

NODE_PORT = 30080


@pytest.fixture(params=["acme", SUPER])
def scene(request: pytest.FixtureRequest, flat_world: World, fresh_namespace: NamespaceFactory) -> Scene:
    return Scene(flat_world, request.param, fresh_namespace)


@pytest.fixture
def in_super(flat_world: World, fresh_namespace: NamespaceFactory) -> Scene:
    return Scene(flat_world, SUPER, fresh_namespace)


def pods(scene: Scene, *roles: str) -> set[str]:
    return {f"{scene.tenant}/{role}" for role in roles}


def test_endpoint_added_removed_replaced(scene: Scene) -> None:
    scene.makes(lambda: scene.endpoints("web-1", "web-2", "web-3"))
    assert scene.answers() == pods(scene, "web-1", "web-2", "web-3")
    scene.makes(lambda: scene.endpoints("web-1", "web-3"))
    assert scene.answers() == pods(scene, "web-1", "web-3")
    touched = scene.makes(lambda: scene.endpoints("web-1", "web-2"))
    assert scene.answers() == pods(scene, "web-1", "web-2")
    # One slot's element is written anew in each of 4 pools on 2 nodes, and which addresses are the node's own.
    assert touched <= 4 * 2 * 2 + 2 * 2


def test_last_endpoint_leaves_and_comes_back(scene: Scene) -> None:
    scene.makes(lambda: scene.endpoints())
    uid = uid_of(scene.tenant)
    for name in scene.world.nodes:
        held = scene.world.kernel(name).forwarding[uid]
        assert {held[Frontend("TCP", vip, PORT)] for vip in scene.vips} == {"reject"}
    scene.makes(lambda: scene.endpoints("web-2"))
    assert scene.answers() == pods(scene, "web-2")


def test_terminating_endpoints_serve_when_none_is_ready(scene: Scene) -> None:
    def begin_to_leave() -> None:
        for item in slices("web", scene.world.some(scene.tenant, "web-1", "web-2"), namespace=scene.namespace):
            for number, one in enumerate(item["endpoints"]):
                one["conditions"] = {"ready": False, "serving": number == 0, "terminating": True}
            scene.client.update(item)

    scene.makes(begin_to_leave)
    assert scene.answers() == pods(scene, "web-1")


def test_service_deleted_and_created(scene: Scene) -> None:
    scene.makes(lambda: scene.client.delete("Service", "web", scene.namespace))
    uid = uid_of(scene.tenant)
    for name in scene.world.nodes:
        assert not any(frontend.address in scene.vips for frontend in scene.world.kernel(name).forwarding.get(uid, {}))
    created = web("web", scene.vips, [], namespace=scene.namespace)[0]
    scene.makes(lambda: scene.client.create(created))  # its slices have been there all the time
    assert scene.answers() == pods(scene, "web-1", "web-2")


def test_ports_changed(scene: Scene) -> None:
    def ports(number: int) -> None:
        scene.patch(
            {
                "ports": [
                    {"name": "http", "protocol": "TCP", "port": number, "targetPort": TARGET},
                    {"name": "ask", "protocol": "UDP", "port": number, "targetPort": TARGET},
                ]
            }
        )

    scene.makes(lambda: ports(81))
    assert scene.answers(port=81) == pods(scene, "web-1", "web-2")
    scene.makes(lambda: ports(PORT))
    assert scene.answers() == pods(scene, "web-1", "web-2")


def test_target_port_changed(scene: Scene) -> None:
    ports = [("http", "TCP", PORT, TARGETS[1]), ("ask", "UDP", PORT, TARGETS[1])]
    moved = slices("web", scene.world.some(scene.tenant, "web-1"), namespace=scene.namespace, ports=ports)

    def move() -> None:
        for item in moved:
            scene.client.update(item)

    scene.makes(move)
    assert scene.answers() == pods(scene, "web-1")
    reply = REQUESTS["TCP"](scene.world.pods[scene.tenant, "client-one"], scene.vips[0], PORT)
    assert isinstance(reply, Reply)
    assert reply.local[1] == TARGETS[1]


def test_internal_traffic_policy_becomes_local(scene: Scene) -> None:
    scene.makes(lambda: scene.patch({"internalTrafficPolicy": "Local"}))
    for where, role in (("client-one", "web-1"), ("client-two", "web-2")):
        outcomes = [REQUESTS["TCP"](scene.world.pods[scene.tenant, where], scene.vips[0], PORT) for _ in range(10)]
        assert {getattr(outcome, "pod", outcome) for outcome in outcomes} == pods(scene, role)


def test_type_becomes_node_port_and_back(in_super: Scene) -> None:
    scene = in_super
    world, nodes = scene.world, scene.world.nodes.values()
    ports = [
        {"name": "http", "protocol": "TCP", "port": PORT, "targetPort": TARGET, "nodePort": NODE_PORT},
        {"name": "ask", "protocol": "UDP", "port": PORT, "targetPort": TARGET, "nodePort": NODE_PORT},
    ]
    scene.makes(lambda: scene.patch({"type": "NodePort", "ports": ports}))
    assert scene.answers() == pods(scene, "web-1", "web-2")
    dialled = [
        (address, request) for node in nodes for address in (node.ip4, node.ip6) for request in REQUESTS.values()
    ]
    for address, request in dialled:
        outcomes = [request(world.outside, address, NODE_PORT) for _ in range(20)]
        assert {getattr(outcome, "pod", outcome) for outcome in outcomes} == pods(scene, "web-1", "web-2"), address
    cluster = [{key: value for key, value in port.items() if key != "nodePort"} for port in ports]
    scene.makes(lambda: scene.patch({"type": "ClusterIP", "ports": cluster}))
    assert scene.answers() == pods(scene, "web-1", "web-2")
    for address, request in dialled:
        assert not isinstance(request(world.outside, address, NODE_PORT, timeout=0.3), Reply)


def test_node_ports_of_a_tenant_are_not_granted_by_themselves(
    flat_world: World, fresh_namespace: NamespaceFactory
) -> None:
    scene = Scene(flat_world, "acme", fresh_namespace)
    scene.patch({"type": "NodePort"})
    flat_world.converged()
    service = scene.client.get("Service", "web", scene.namespace).object
    numbers = {port["nodePort"] for port in service["spec"]["ports"]}
    for name in flat_world.nodes:
        forwarding = flat_world.kernel(name).forwarding
        dialled = {
            frontend.port for held in forwarding.values() for frontend in held if frontend.address in ANY_NODE.values()
        }
        assert not numbers & dialled
    rows = flat_world.cluster.ask("brain", "/refusals", tenant="acme", namespace=scene.namespace, service="web")
    assert {row["reason"] for row in rows} == {"node-port-not-granted"}
