"""A tenant is removed: nothing of it stays, and who gets its conntrack zone and its pods' addresses inherits nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from e2e.controlplane import ControlPlane
from e2e.oracle import SUPER
from e2e.polling import eventually
from e2e.traffic import REQUESTS, Traffic
from e2e.world import LABEL, PORT, World, fresh_vips, running, web
from vcproxy.lab import DialFailed, Node, Reply, TcpSession

pytestmark = [pytest.mark.controlplane, pytest.mark.packets]

ZONE = 30_000
SOURCE_PORT = 43000


@pytest.fixture
def world(
    super_plane: ControlPlane,
    tenant_planes: tuple[ControlPlane, ControlPlane],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    """A tenant `leaver` on nodes with a single conntrack zone for tenants."""
    options = {"name": "nftables", "options": {"zones": [ZONE, ZONE]}}
    directory = tmp_path_factory.mktemp("removal")
    with running(directory, super_plane, flat={"leaver": tenant_planes[0]}, backend=options) as world:
        yield world


def flows(node: Node, zone: int) -> list[str]:
    """Connections whose first packet was in a zone (the flat network has it in that direction only)."""
    found = [
        node.run(["conntrack", "-L", "-f", family, "--orig-zone", str(zone)]).stdout for family in ("ipv4", "ipv6")
    ]
    return [line for text in found for line in text.splitlines()]


def move_pods(world: World, tenant: str | None) -> None:
    """Take leaver's Pods away from the super cluster, or make them another tenant's: the same addresses again."""
    client = world.super.client
    client.delete_all("Pod", world.namespace, labels=f"{LABEL}=leaver")
    for (owner, role), made in world.pods.items():
        if owner == "leaver" and tenant is not None:
            world.tell_pod(f"{tenant}-{role}", tenant, made)


def unforwarded(world: World) -> None:
    """Wait until no node has elements of leaver."""

    def gone() -> bool:
        return all("dir-leaver" not in world.kernel(name).forwarding for name in world.nodes)

    eventually(gone, what="end of elements")


def test_removed_tenant_leaves_nothing_to_its_zones_next_holder(world: World) -> None:
    vips = fresh_vips()
    client = world.planes["leaver"].client
    client.create_all(web("leaving", vips, world.some("leaver", "web-1")))
    try:
        world.converged()
        place, nodes = world.pods["leaver", "client-one"], world.nodes
        assert {world.kernel(name).zones["dir-leaver"] for name in nodes} == {ZONE}
        session = TcpSession(place, vips[0], PORT, timeout=0.5, source_port=SOURCE_PORT)
        for vip in vips:
            reply = REQUESTS["UDP"](place, vip, PORT, source_port=SOURCE_PORT)
            assert isinstance(reply, Reply)
            assert reply.pod == "leaver/web-1"
        assert flows(nodes["one"], ZONE)

        # Its kubeconfig goes; its pods are still there, and must not fall to the super cluster.
        (world.cluster.tenants / "leaver.kubeconfig").unlink()
        plane = world.planes.pop("leaver")
        unforwarded(world)
        eventually(lambda: not any(flows(node, ZONE) for node in nodes.values()), what="end of flows")
        assert "dir-leaver" not in {row["uid"] for row in world.cluster.ask("brain")["tenants"]}
        for name in nodes:
            assert "dir-leaver" in world.kernel(name).attached
        for vip in vips:
            for protocol, request in REQUESTS.items():
                outcome = request(place, vip, PORT, timeout=0.3)
                assert not isinstance(outcome, Reply), f"{protocol} {vip}: {outcome}"

        # Its pods go, and with them attachments and zone.
        move_pods(world, None)
        eventually(lambda: all(set(world.kernel(name).zones) == {SUPER} for name in nodes), what="end of zone")
        for name in nodes:
            assert set(world.kernel(name).attached) == set()
            assert world.kernel(name).faults == ()

        # Another tenant gets the same addresses, and with them the only zone.
        world.apply("heir", web("leaving", vips, world.some("leaver", "web-2")))
        move_pods(world, "heir")
        world.converged("heir")
        assert {world.kernel(name).zones["dir-heir"] for name in nodes} == {ZONE}
        with pytest.raises(DialFailed):
            session.ask("still there?")
        session.close()
        for vip in vips:
            for protocol, request in REQUESTS.items():
                reply = request(place, vip, PORT, source_port=SOURCE_PORT)
                assert isinstance(reply, Reply), f"{protocol} {vip}: {reply}"
                assert reply.pod == "leaver/web-2"
        plane.client.get("Service", "leaving", "default")  # nobody has touched the tenant's own API server
    finally:
        client.delete("Service", "leaving", "default")
        for family in (4, 6):
            client.delete("EndpointSlice", f"leaving-{family}", "default")


def test_tenant_that_comes_back_is_served_again(world: World) -> None:
    vips = fresh_vips()
    plane = world.planes["leaver"]
    plane.client.create_all(web("returning", vips, world.some("leaver", "web-1", "web-2")))
    try:
        world.converged()
        (world.cluster.tenants / "leaver.kubeconfig").unlink()
        unforwarded(world)
        assert not isinstance(REQUESTS["TCP"](world.pods["leaver", "client-one"], vips[0], PORT, timeout=0.3), Reply)
        world.give_kubeconfig("leaver", plane.kubeconfig)
        world.converged()
        with Traffic(world.pods["leaver", "client-one"], vips[0], PORT) as traffic:
            traffic.more(20)
        assert set(traffic.answers) == {"leaver/web-1", "leaver/web-2"}
    finally:
        plane.client.delete("Service", "returning", "default")
        for family in (4, 6):
            plane.client.delete("EndpointSlice", f"returning-{family}", "default")
