"""Endpoint choice: upstream's TestCategorizeEndpoints as a table, frontends and policies, and a reference to agree with.

The reference is kube-proxy's CategorizeEndpoints written down endpoint by endpoint, as slowly and plainly as possible.
"""

import time
from collections.abc import Iterable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcproxy.model.addresses import format_address, parse_address
from vcproxy.model.endpoints import READY, SERVING, TERMINATING, Endpoint, HintSet, name_id, pack, unpack
from vcproxy.model.forwarding import Action, ForwardedFrontend, ForwardedPort, Masquerade
from vcproxy.model.services import Frontend, FrontendKind, PortKey, Protocol, ServicePort
from vcproxy.node.resolver import NodeView, resolve

NODE, ZONE = "node-a", "zone-a"
VIEW = NodeView.of(NODE, ZONE)
WELL, LEAVING, DEAD = READY | SERVING, SERVING | TERMINATING, 0
CLUSTER_IP, LOAD_BALANCER, NODE_PORT = FrontendKind.CLUSTER_IP, FrontendKind.LOAD_BALANCER, FrontendKind.NODE_PORT


def hints(*, zones: Iterable[str] = (), nodes: Iterable[str] = ()) -> HintSet | None:
    zones, nodes = tuple(sorted(map(name_id, zones))), tuple(sorted(map(name_id, nodes)))
    return HintSet(zones, nodes) if zones or nodes else None


def pod(
    last: int,
    flags: int = WELL,
    *,
    node: str = "",
    zones: Iterable[str] = (),
    nodes: Iterable[str] = (),
    port: int = 80,
) -> Endpoint:
    return Endpoint(parse_address(f"10.1.2.{last}"), port, flags, name_id(node), hints(zones=zones, nodes=nodes))


def service(
    *endpoints: Endpoint,
    kinds: Iterable[FrontendKind] = (CLUSTER_IP,),
    internal_local: bool = False,
    external_local: bool = False,
    protocol: Protocol = Protocol.TCP,
) -> ServicePort:
    packed4, packed6, hint_sets = pack(endpoints)
    addresses = {CLUSTER_IP: "172.30.0.41", LOAD_BALANCER: "1.2.3.4", NODE_PORT: "0.0.0.0"}
    return ServicePort(
        PortKey("ns1", "svc1", "p80", protocol),
        tuple(Frontend(kind, parse_address(addresses[kind]), 80) for kind in kinds),
        internal_local,
        external_local,
        0,
        (),
        hint_sets,
        packed4,
        packed6,
    )


def targets(packed: bytes) -> set[int]:
    """Last octets of packed IPv4 targets."""
    assert len(packed) % 6 == 0
    return {packed[at + 3] for at in range(0, len(packed), 6)}


class Case(NamedTuple):
    """A row of upstream's table: `cluster` and `local` are last octets; None where the policy does not use the pool."""

    name: str
    endpoints: tuple[Endpoint, ...]
    cluster: set[int] | None
    local: set[int] | None = None
    policy: str = "Cluster"
    zone: str = ZONE


BOTH_ZONES = (pod(3, zones=["zone-a"]), pod(4, zones=["zone-b"]), pod(5, zones=["zone-b"]), pod(6, zones=["zone-a"]))

CASES = [
    Case("hints enabled: the endpoints of this zone", BOTH_ZONES, {3, 6}),
    Case("hints, no zone label on the node: all", BOTH_ZONES, {3, 4, 5, 6}, zone=""),
    Case("hints, node in a zone without endpoints: all", BOTH_ZONES, {3, 4, 5, 6}, zone="zone-c"),
    Case("one endpoint without a hint: all", (*BOTH_ZONES[:3], pod(6)), {3, 4, 5, 6}),
    Case(
        "a hint missing on an endpoint that is not ready: the endpoints of this zone",
        (*BOTH_ZONES[:3], pod(6, DEAD)),
        {3},
    ),
    Case(
        "an endpoint of this zone is not ready: the others of it",
        (pod(3, DEAD, zones=["zone-a"]), *BOTH_ZONES[1:]),
        {6},
    ),
    Case(
        "the only endpoint of this zone is not ready: all ready ones",
        (pod(3, DEAD, zones=["zone-a"]), *BOTH_ZONES[1:3]),
        {4, 5},
    ),
    Case(
        "several zones in a hint",
        (
            pod(3, zones=["zone-a"]),
            pod(4, zones=["zone-b"]),
            pod(5, zones=["zone-a", "zone-b"]),
            pod(6, zones=["zone-c"]),
        ),
        {3, 5},
    ),
    Case(
        "node hints win over zone hints",
        (pod(3, zones=["zone-a"], nodes=[NODE]), pod(4, zones=["zone-a"], nodes=["node-b"])),
        {3},
    ),
    Case(
        "no node hint names this node: the endpoints of this zone",
        (pod(3, zones=["zone-a"], nodes=["node-b"]), pod(4, zones=["zone-b"], nodes=["node-c"])),
        {3},
    ),
    Case(
        "no hint names this node or zone: all",
        (pod(3, zones=["zone-b"], nodes=["node-b"]), pod(4, zones=["zone-c"], nodes=["node-c"])),
        {3, 4},
    ),
    Case(
        "a node hint missing on one endpoint: the endpoints of this zone",
        (pod(3, zones=["zone-a"], nodes=[NODE]), pod(4, zones=["zone-a"])),
        {3, 4},
    ),
    Case(
        "internalTrafficPolicy: Local, no endpoints on this node", (pod(3), pod(4, node="node-b")), None, set(), "iTP"
    ),
    Case("internalTrafficPolicy: Local", (pod(3, node=NODE), pod(4, node="node-b")), None, {3}, "iTP"),
    Case(
        "internalTrafficPolicy: Local is never subject to topology",
        (pod(3, zones=["zone-b"], node=NODE), pod(4, zones=["zone-a"], node="node-b")),
        None,
        {3},
        "iTP",
    ),
    Case("Cluster traffic policy, endpoints not ready", (pod(3, DEAD), pod(4, DEAD)), set()),
    Case("Cluster traffic policy, some endpoints are ready", (pod(3, DEAD), pod(4)), {4}),
    Case("Cluster traffic policy, all endpoints are terminating", (pod(3, LEAVING), pod(4, LEAVING)), {3, 4}),
    Case(
        "Cluster traffic policy, terminating ones that do not serve are never used",
        (pod(3, LEAVING), pod(4, TERMINATING)),
        {3},
    ),
    Case("Cluster traffic policy, ready ones win over terminating ones", (pod(3, LEAVING), pod(4)), {4}),
    Case(
        "topology never applies to terminating endpoints",
        (pod(3, LEAVING, zones=["zone-a"]), pod(4, LEAVING, zones=["zone-b"])),
        {3, 4},
    ),
    Case("iTP: Local, eTP: Cluster, all endpoints remote", (pod(3, node="node-b"),), {3}, set(), "iTP+LB"),
    Case("iTP: Local, eTP: Cluster, some local", (pod(3, node=NODE), pod(4, node="node-b")), {3, 4}, {3}, "iTP+LB"),
    Case("iTP: Cluster, eTP: Local, some local", (pod(3, node=NODE), pod(4, node="node-b")), {3, 4}, {3}, "eTP"),
    Case("iTP: Local, eTP: Local, all remote", (pod(3, node="node-b"),), {3}, set(), "both"),
    Case("iTP: Local, eTP: Local, some local", (pod(3, node=NODE), pod(4, node="node-b")), {3, 4}, {3}, "both"),
    Case(
        "eTP: Local, the local one terminating, the remote one ready",
        (pod(3, LEAVING, node=NODE), pod(4, node="node-b")),
        {4},
        {3},
        "eTP",
    ),
    Case(
        "eTP: Local, a local one ready and one terminating",
        (pod(3, LEAVING, node=NODE), pod(4, node=NODE)),
        {4},
        {4},
        "eTP",
    ),
    Case(
        "topology and locality together",
        (
            pod(3, zones=["zone-a"], node=NODE),
            pod(4, zones=["zone-b"], node=NODE),
            pod(5, zones=["zone-a"], node="node-b"),
            pod(6, zones=["zone-b"], node="node-b"),
        ),
        {3, 5},
        {3, 4},
        "eTP",
    ),
    Case(
        "eTP: Local, terminating and not serving", (pod(3, TERMINATING, node=NODE), pod(4, DEAD)), set(), set(), "eTP"
    ),
    Case("no endpoints", (), set(), set(), "eTP"),
]

POLICIES = {
    "Cluster": {},
    "iTP": {"internal_local": True},
    "iTP+LB": {"internal_local": True, "kinds": (CLUSTER_IP, LOAD_BALANCER)},
    "eTP": {"external_local": True, "kinds": (CLUSTER_IP, LOAD_BALANCER)},
    "both": {"internal_local": True, "external_local": True, "kinds": (CLUSTER_IP, LOAD_BALANCER)},
}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_categorize_endpoints(case: Case) -> None:
    (port,) = resolve([service(*case.endpoints, **POLICIES[case.policy])], NodeView.of(NODE, case.zone))
    assert targets(port.cluster4) == (case.cluster or set())
    assert targets(port.local4) == (case.local or set())


def actions(*endpoints: Endpoint, **policies: bool) -> dict[str, tuple[str, str, str]]:
    """kind -> (inside, outside, masquerade)."""
    (port,) = resolve([service(*endpoints, kinds=(CLUSTER_IP, LOAD_BALANCER), **policies)], VIEW)
    return {each.kind.name: (each.inside.name, each.outside.name, each.masquerade.name) for each in port.frontends}


HERE, ELSEWHERE = pod(3, node=NODE), pod(4, node="node-b")


@pytest.mark.parametrize(
    ("endpoints", "policies", "cluster_ip", "load_balancer"),
    [
        ([HERE], {}, "CLUSTER CLUSTER NONLOCAL", "CLUSTER CLUSTER ALWAYS"),
        ([], {}, "REJECT REJECT NONLOCAL", "REJECT REJECT ALWAYS"),
        ([HERE], {"internal_local": True}, "LOCAL LOCAL NONLOCAL", "CLUSTER CLUSTER ALWAYS"),
        ([ELSEWHERE], {"internal_local": True}, "DROP DROP NONLOCAL", "CLUSTER CLUSTER ALWAYS"),
        ([], {"internal_local": True}, "REJECT REJECT NONLOCAL", "REJECT REJECT ALWAYS"),
        ([HERE], {"external_local": True}, "CLUSTER CLUSTER NONLOCAL", "CLUSTER LOCAL HOST"),
        ([ELSEWHERE], {"external_local": True}, "CLUSTER CLUSTER NONLOCAL", "CLUSTER DROP HOST"),
        ([], {"external_local": True}, "REJECT REJECT NONLOCAL", "REJECT REJECT HOST"),
        ([pod(3, DEAD, node=NODE)], {"external_local": True}, "REJECT REJECT NONLOCAL", "REJECT REJECT HOST"),
    ],
)
def test_traffic_policies(
    endpoints: list[Endpoint], policies: dict[str, bool], cluster_ip: str, load_balancer: str
) -> None:
    found = actions(*endpoints, **policies)
    assert " ".join(found["CLUSTER_IP"]) == cluster_ip
    assert " ".join(found["LOAD_BALANCER"]) == load_balancer


def test_families_are_resolved_apart() -> None:
    v6 = Endpoint(parse_address("fd00::3"), 80, WELL, name_id(NODE))
    packed4, packed6, _ = pack([v6])
    port = ServicePort(
        PortKey("ns1", "svc1", "", Protocol.TCP),
        (Frontend(CLUSTER_IP, parse_address("172.30.0.41"), 80), Frontend(CLUSTER_IP, parse_address("fd00:1::1"), 80)),
        endpoints4=packed4,
        endpoints6=packed6,
    )
    (forwarded,) = resolve([port], VIEW)
    assert [each.inside for each in forwarded.frontends] == [Action.REJECT, Action.CLUSTER]
    assert forwarded.cluster6 == parse_address("fd00::3") + (80).to_bytes(2, "big")
    assert forwarded.own6 == parse_address("fd00::3")
    assert forwarded.cluster4 == b""


def test_own_addresses_are_those_of_used_targets_on_this_node_once_each() -> None:
    port = service(
        pod(3, node=NODE), pod(3, node=NODE, port=81), pod(4, node="node-b"), pod(5, DEAD, node=NODE), pod(6, node=NODE)
    )
    (forwarded,) = resolve([port], VIEW)
    assert forwarded.own4 == parse_address("10.1.2.3") + parse_address("10.1.2.6")
    assert resolve([port], NodeView.of("node-c", ZONE))[0].own4 == b""


def test_neighbouring_ports_with_the_same_pod_each_own_it() -> None:
    one, other = resolve([service(pod(3, node=NODE)), service(pod(3, node=NODE))], VIEW)
    assert one.own4 == other.own4 == parse_address("10.1.2.3")


def test_serving_targets_are_kept_for_udp_alone_and_ignore_policies() -> None:
    endpoints = (pod(3, zones=["zone-b"]), pod(4, LEAVING, zones=["zone-b"]), pod(5, DEAD, zones=["zone-a"]))
    udp, tcp = resolve([service(*endpoints, protocol=Protocol.UDP), service(*endpoints)], VIEW)
    assert targets(udp.serving4) == {3, 4}
    assert tcp.serving4 == b""


def test_a_port_without_frontends_of_a_family_has_no_pools_of_it() -> None:
    (forwarded,) = resolve([service(pod(3, node=NODE), kinds=())], VIEW)
    assert forwarded == ForwardedPort(PortKey("ns1", "svc1", "p80", Protocol.TCP))


def test_affinity_and_source_ranges_go_through() -> None:
    from vcproxy.model.addresses import parse_prefix

    port = ServicePort(
        PortKey("ns", "s", "", Protocol.TCP), affinity_seconds=10800, source_ranges=(parse_prefix("10.0.0.0/8"),)
    )
    (forwarded,) = resolve([port], VIEW)
    assert (forwarded.affinity_seconds, forwarded.source_ranges) == (10800, port.source_ranges)


# The reference.


def reference(port: ServicePort, node: NodeView) -> ForwardedPort:
    pools: dict[int, tuple[list[Endpoint], list[Endpoint], bool]] = {}
    for family, packed in ((4, port.endpoints4), (6, port.endpoints6)):
        everything = unpack(packed, family, port.hint_sets)
        usable = any(e.flags & READY or (e.flags & SERVING and e.flags & TERMINATING) for e in everything)
        pools[family] = (reference_cluster(everything, node), reference_local(everything, node), usable)

    frontends = []
    used: dict[int, set[Action]] = {4: set(), 6: set()}
    for frontend in port.frontends:
        cluster, local, usable = pools[frontend.family]
        none = Action.DROP if usable else Action.REJECT
        by_cluster = Action.CLUSTER if cluster else none
        by_local = Action.LOCAL if local else none
        if frontend.kind == FrontendKind.CLUSTER_IP:
            inside = outside = by_local if port.internal_local else by_cluster
            masquerade = Masquerade.NONLOCAL
        else:
            inside, outside = by_cluster, by_local if port.external_local else by_cluster
            masquerade = Masquerade.HOST if port.external_local else Masquerade.ALWAYS
        used[frontend.family] |= {inside, outside}
        frontends.append(ForwardedFrontend(frontend.kind, frontend.address, frontend.port, inside, outside, masquerade))

    def pack_targets(endpoints: Iterable[Endpoint]) -> bytes:
        return b"".join(e.address + e.port.to_bytes(2, "big") for e in endpoints)

    columns: dict[str, bytes] = {}
    for family, packed in ((4, port.endpoints4), (6, port.endpoints6)):
        cluster, local, _ = pools[family]
        cluster = cluster if Action.CLUSTER in used[family] else []
        local = local if Action.LOCAL in used[family] else []
        own = sorted({e.address for e in [*cluster, *local] if e.node == node.node_id != 0})
        serving = [e for e in unpack(packed, family, port.hint_sets) if e.flags & (READY | SERVING)]
        columns[f"cluster{family}"] = pack_targets(cluster)
        columns[f"local{family}"] = pack_targets(local)
        columns[f"own{family}"] = b"".join(own)
        columns[f"serving{family}"] = pack_targets(serving) if port.key.protocol == Protocol.UDP else b""
    return ForwardedPort(
        key=port.key,
        frontends=tuple(frontends),
        affinity_seconds=port.affinity_seconds,
        source_ranges=port.source_ranges,
        **columns,
    )


def reference_cluster(endpoints: list[Endpoint], node: NodeView) -> list[Endpoint]:
    ready = [e for e in endpoints if e.flags & READY]
    node_hints = [set(e.hints.nodes) if e.hints else set() for e in ready]
    zone_hints = [set(e.hints.zones) if e.hints else set() for e in ready]
    for every, us in ((node_hints, node.node_id), (zone_hints, node.zone_id)):
        if ready and us and all(every) and any(us in names for names in every):
            return [e for e, names in zip(ready, every, strict=True) if us in names]
    return ready or [e for e in endpoints if e.flags & SERVING and e.flags & TERMINATING]


def reference_local(endpoints: list[Endpoint], node: NodeView) -> list[Endpoint]:
    here = [e for e in endpoints if node.node_id and e.node == node.node_id]
    ready = [e for e in here if e.flags & READY]
    return ready or [e for e in here if e.flags & SERVING and e.flags & TERMINATING]


names = st.sampled_from(["a", "b", "c"])
some_hints = st.one_of(
    st.none(),
    st.builds(
        lambda zones, nodes: hints(zones=[f"zone-{z}" for z in zones], nodes=[f"node-{n}" for n in nodes]),
        st.sets(names, max_size=2),
        st.sets(names, max_size=2),
    ),
)
some_addresses = st.one_of(
    st.integers(1, 6).map(lambda last: parse_address(f"10.0.0.{last}")),
    st.integers(1, 4).map(lambda last: parse_address(f"fd00::{last}")),
)
some_endpoints = st.builds(
    Endpoint,
    some_addresses,
    st.sampled_from([80, 81]),
    st.integers(0, 7),
    st.sampled_from(["", "node-a", "node-b"]).map(name_id),
    some_hints,
)
some_frontends = st.builds(
    Frontend,
    st.sampled_from(FrontendKind),
    st.sampled_from([parse_address("172.30.0.1"), parse_address("172.30.0.2"), parse_address("fd00:1::1")]),
    st.integers(1, 3),
)


@st.composite
def some_ports(draw: st.DrawFn) -> ServicePort:
    packed4, packed6, hint_sets = pack(draw(st.lists(some_endpoints, max_size=8)))
    return ServicePort(
        PortKey("ns", f"svc-{draw(st.integers(0, 9))}", "", draw(st.sampled_from(Protocol))),
        tuple(sorted(set(draw(st.lists(some_frontends, max_size=4))))),
        draw(st.booleans()),
        draw(st.booleans()),
        0,
        (),
        hint_sets,
        packed4,
        packed6,
    )


@given(st.lists(some_ports(), max_size=6), st.sampled_from(["", "node-a", "node-b"]), st.sampled_from(["", "zone-a"]))
@settings(max_examples=300, deadline=None)
def test_many_at_once_agree_with_the_reference(ports: list[ServicePort], node: str, zone: str) -> None:
    view = NodeView.of(node, zone)
    wanted = [reference(port, view) for port in ports]
    assert resolve(ports, view) == wanted
    assert [resolve([port], view)[0] for port in ports] == wanted


def test_a_hint_that_is_out_of_range_is_no_hint() -> None:
    port = service(pod(3, zones=["zone-a"]), pod(4, zones=["zone-b"]))
    damaged = port.endpoints4[:6] + b"\x99\x99" + port.endpoints4[8:]
    broken = ServicePort(port.key, port.frontends, hint_sets=port.hint_sets, endpoints4=damaged)
    assert targets(resolve([broken, port], VIEW)[0].cluster4) == {3, 4}


def test_cost_grows_no_faster_than_the_ports() -> None:
    ports = [service(*(pod(last, node=f"node-{last}") for last in range(1, 11))) for _ in range(5000)]
    best = min(timed(ports) for _ in range(3))
    assert best / len(ports) < 100e-6, "an order of magnitude above what it takes: a loop over endpoints has crept in"


def timed(ports: list[ServicePort]) -> float:
    started = time.perf_counter()
    resolve(ports, VIEW)
    return time.perf_counter() - started


def test_addresses_are_as_packed() -> None:
    assert format_address(resolve([service(pod(7))], VIEW)[0].cluster4[:4]) == "10.1.2.7"
