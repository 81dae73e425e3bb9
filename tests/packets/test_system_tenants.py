"""Tenants come and go: nothing of one is left on a node, and a node is not told of tenants it has no pods of."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator

import pytest

from tests.packets.system import NODES, VIP, Site, Web, eventually, site

pytestmark = pytest.mark.packets

WEB = Web(pods=("web-1", "web-2"))


@pytest.fixture(scope="module")
def running() -> Iterator[Site]:
    with site(("acme",), ("red", "blue"), webs=[WEB]) as made:
        yield made


def held(site: Site, node: str) -> set[str]:
    return {row["name"] for row in site.cluster.ask(node, "/tenants")}


def test_tenant_is_sent_to_nodes_with_its_pods_only(running: Site) -> None:
    running.add_overlay("small", pods=("client-one", "web-1"))
    running.publish("small", Web(pods=("web-1",)), nodes=("one",))
    assert "small" in held(running, "one")
    assert "small" not in held(running, "two")
    assert "dir-small" not in running.nft("two", "list", "set", "inet", "vcproxy", "tenants")


def test_tenant_removed(running: Site) -> None:
    """Its elements, its attachments, its zone and its established connections go; its neighbour keeps all of its own.

    Red and blue dial the same ClusterIP. Red's zone is free only when nothing of red is left in it.
    """
    zone = running.zone("one", "red")
    assert zone
    assert of_zone(running, "one", zone)
    neighbours = {tenant: running.zone("one", tenant) for tenant in ("acme", "blue")}
    with running.session("red") as red, running.session("blue") as blue:
        assert red.ask("x") == f"{red.reply.pod} x"
        assert running.flows("one", zone)
        running.remove("red")
        forgotten(running, "red")
        for node in NODES:
            assert eventually(functools.partial(zone_is_gone, running, node, "red"))
        assert eventually(lambda: not of_zone(running, "one", zone)), of_zone(running, "one", zone)
        assert eventually(lambda: not running.flows("one", zone)), running.flows("one", zone)
        assert blue.ask("y") == f"{blue.reply.pod} y"
        assert {tenant: running.zone("one", tenant) for tenant in neighbours} == neighbours
    pods = [pod for name, pod in running.pods.items() if name.startswith("red/")]
    listed = running.nft("one", "-j", "list", "table", "inet", "vcproxy")
    assert not [pod.ip4 for pod in pods if f'"{pod.ip4}"' in listed]
    assert running.answered("blue", "client-one", "tcp", VIP[4]) == {"blue/web-1", "blue/web-2"}
    assert not {"red/web-1", "red/web-2"} & running.answered("red", "client-one", "tcp", VIP[4], times=2)


def test_tenant_of_the_same_name_and_addresses_comes_again(running: Site) -> None:
    """As new: nothing of its former life answers, neither its endpoints nor its connections."""
    running.remove("acme")
    forgotten(running, "acme")
    running.tell_pods("acme")
    running.publish("acme", Web(pods=("web-3",)))
    for client in ("client-one", "client-two"):
        for protocol in ("tcp", "udp"):
            for address in VIP.values():
                assert running.answered("acme", client, protocol, address) == {"acme/web-3"}


def zone_is_gone(site: Site, node: str, tenant: str) -> bool:
    return site.zone(node, tenant) is None


def forgotten(site: Site, tenant: str) -> None:
    """Wait until no agent holds the tenant."""
    site.cluster.wait(f"the nodes forgot {tenant}", lambda: not any(tenant in held(site, node) for node in NODES))


def of_zone(site: Site, node: str, zone: int) -> list[object]:
    """The elements of our table in which a zone's number stands in the place of one: key's first field, or value."""
    found: list[object] = []
    listed = json.loads(site.nft(node, "-j", "list", "table", "inet", "vcproxy"))["nftables"]
    for entry in listed:
        for kind in ("map", "set"):
            for element in entry.get(kind, {}).get("elem", []):
                key = element[0] if kind == "map" else element
                key = key.get("elem", {}).get("val", key) if isinstance(key, dict) else key
                first = key["concat"][0] if isinstance(key, dict) and "concat" in key else key
                if zone in (first, element[1] if kind == "map" else None):
                    found.append((entry[kind]["name"], element))
    return found
