"""Packets while commits go on: thousands of new connections to a Service that changes all the time, and not one fails.

The lookups of one packet may fall on both sides of a commit. So the Service changes in every way that moves its pools:
how many endpoints there are (also counts that no chain exists for yet), which they are, affinity, traffic policy; and
other Services come and go beside it. Every endpoint that is ever named is alive, so there is no excuse.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.packets.programmed import Programmed, frontend, key, programmed
from vcproxy.lab import Client, Lab, Pod
from vcproxy.lab.load import Load, Target
from vcproxy.model.addresses import parse_address
from vcproxy.model.forwarding import Action, ForwardedFrontend, ForwardedPort
from vcproxy.model.services import FrontendKind, Protocol

pytestmark = pytest.mark.packets

VIP = {4: "10.97.0.10", 6: "fd00:97::10"}
LB = {4: "198.51.100.10", 6: "2001:db8:100::10"}
NODE_PORT = 30080
TARGET_PORTS = range(8000, 8016)
SECONDS = 6.0


@dataclass(frozen=True)
class World:
    backend: Programmed
    client: Pod
    outside: Client
    pods: tuple[Pod, ...]
    node4: str
    node6: str


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Lab("vcp-commits") as lab:
        one, two = lab.node("one"), lab.node("two")
        client = one.flat_pod("client", "10.200.1.2", "fd00:200:0:1::2")
        pods = (
            one.flat_pod("near", "10.200.1.3", "fd00:200:0:1::3"),
            two.flat_pod("far", "10.200.2.2", "fd00:200:0:2::2"),
            two.flat_pod("farther", "10.200.2.3", "fd00:200:0:2::3"),
        )
        for pod in pods:
            lab.serve(pod, tcp=TARGET_PORTS, udp=TARGET_PORTS)
        outside = lab.client("outside", "192.168.77.200", "fd77::200")
        for prefix in ("198.51.100.0/24", "2001:db8:100::/64"):
            lab.route(outside, prefix, via=one)
        with programmed(one) as (backend,):
            yield World(backend, client, outside, pods, one.ip4, one.ip6)


def frontends(family: int, *, local: bool) -> list[ForwardedFrontend]:
    outside = Action.LOCAL if local else Action.CLUSTER
    return [
        frontend(FrontendKind.CLUSTER_IP, VIP[family], 80),
        frontend(FrontendKind.LOAD_BALANCER, LB[family], 80, outside=outside),
        frontend(FrontendKind.NODE_PORT, family, NODE_PORT, outside=outside),
    ]


def targets(world: World, family: int, pods: tuple[Pod, ...], count: int, chance: random.Random) -> bytes:
    """`count` of all that is served there."""
    every = [
        parse_address(pod.ip4 if family == 4 else pod.ip6) + port.to_bytes(2, "big")
        for pod in pods
        for port in TARGET_PORTS
    ]
    return b"".join(sorted(chance.sample(every, min(count, len(every)))))


def port(world: World, protocol: Protocol, chance: random.Random, *, name: str = "web") -> ForwardedPort:
    """The Service in one of its forms."""
    local = chance.random() < 0.3
    count = chance.choice((1, 2, 3, 4, 5, 7, 9, 16, chance.randint(17, 48)))
    everything = {
        family: targets(world, family, world.pods, len(world.pods) * len(TARGET_PORTS), chance) for family in (4, 6)
    }
    return ForwardedPort(
        key(name, protocol),
        tuple(held for family in (4, 6) for held in frontends(family, local=local)),
        cluster4=targets(world, 4, world.pods, count, chance),
        cluster6=targets(world, 6, world.pods, count, chance),
        local4=targets(world, 4, world.pods[:1], chance.randint(1, 16), chance) if local else b"",
        local6=targets(world, 6, world.pods[:1], chance.randint(1, 16), chance) if local else b"",
        affinity_seconds=chance.choice((0, 0, 10, 300)),
        # All of them go on serving, so no UDP flow is cut with an answer on its way.
        serving4=everything[4] if protocol is Protocol.UDP else b"",
        serving6=everything[6] if protocol is Protocol.UDP else b"",
    )


def bystander(number: int) -> ForwardedPort:
    address = f"10.97.1.{number % 250}"
    return ForwardedPort(
        key(f"other-{number}"),
        (frontend(FrontendKind.CLUSTER_IP, address, 80),),
        cluster4=parse_address("10.200.2.2") + b"\x1f\x40",
    )


def test_not_one_connection_fails_while_a_service_changes(world: World) -> None:
    chance = random.Random(7)
    backend = world.backend
    protocols = (Protocol.TCP, Protocol.UDP)
    backend.put("super", *(port(world, protocol, chance) for protocol in protocols), complete=True)
    inside: list[Target] = [(protocol, vip, 80) for protocol in ("tcp", "udp") for vip in VIP.values()]
    public: list[Target] = [
        (protocol, address, number)
        for protocol in ("tcp", "udp")
        for address, number in (
            *((lb, 80) for lb in LB.values()),
            (world.node4, NODE_PORT),
            (world.node6, NODE_PORT),
        )
    ]
    commits = 0
    with Load(world.client, inside) as pods, Load(world.outside, public) as outside:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            backend.put("super", *(port(world, protocol, chance) for protocol in protocols), bystander(commits))
            if commits >= 20:
                backend.remove("super", key(f"other-{commits - 20}"))
            commits += 1
    assert commits > 100, "too few changes to prove anything"
    for load in (pods, outside):
        assert load.result.failures == {}, load.result.first_failures
        assert load.result.count > 1000
        assert set(load.result.answers) == {"near", "far", "farther"}


def test_not_one_connection_fails_while_the_table_is_repaired_and_adopted(world: World) -> None:
    """Agents that come and go, and repair without end: all of them leave alone what is right."""
    chance = random.Random(8)
    backend, held = world.backend, None
    wanted = [port(world, protocol, chance) for protocol in (Protocol.TCP, Protocol.UDP)]
    backend.put("super", *wanted, complete=True)
    runs = 0
    with Load(world.client, [(protocol, vip, 80) for protocol in ("tcp", "udp") for vip in VIP.values()]) as load:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            held = Programmed(backend.node)
            assert held.put("super", *wanted, complete=True).operations == 0
            assert held.repair().missing == 0
            held.backend.close()
            runs += 1
    assert runs > 3
    assert load.result.failures == {}, load.result.first_failures
    assert load.result.count > 1000
