"""What the forwarding tables mean for one packet, worked out in Python: the column that needs no kernel.

Objects go through the product's own pure stages (shapes, compiler, resolver, node state), and what comes out is read as
docs/dataplane.md says the table is: who a client is, which frontend answers, which pool, whether the source stays.
Nothing of the nftables backend is used, so this column and the ones with packets agree only if both are right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from tests.conformance.model import (
    DROP,
    NODE,
    REJECT,
    UNTOUCHED,
    Apart,
    Case,
    Configuration,
    Expectation,
    Hit,
    To,
    Verdict,
)
from tests.conformance.objects import SERVICE_CIDRS, Cast, Object, Plan, dialled, objects
from vcproxy.backend.protocol import NodeState
from vcproxy.brain.compiler import compile_service
from vcproxy.brain.guard import UNRESTRICTED
from vcproxy.kube import shapes
from vcproxy.model.addresses import format_address, parse_address, parse_prefix
from vcproxy.model.forwarding import Action, ForwardedFrontend, ForwardedPort, Masquerade
from vcproxy.model.node import NodeFacts
from vcproxy.model.services import FrontendKind, Protocol, ServicePort
from vcproxy.node.config import DetectLocal, NodeConfiguration
from vcproxy.node.nodestate import node_rules, node_state
from vcproxy.node.resolver import NodeView, resolve

POD_CIDRS = ("10.200.0.0/16", "fd00:200::/32")
NODE_PORT_ADDRESSES = {
    "primary": ("primary",),
    "all": ("0.0.0.0/0", "::/0"),
    "second": ("192.168.77.111/32", "fd77::111/128"),
}
_VERDICTS = {Action.DROP: DROP, Action.REJECT: REJECT}


@dataclass(frozen=True)
class Packet:
    """The first packet of a connection. `of_node`: its source is an address of the node, which are `own`."""

    source: bytes
    destination: bytes
    port: int
    protocol: Protocol
    of_node: bool
    own: frozenset[bytes] = frozenset()


def compiled(held: Iterable[Object]) -> list[ServicePort]:
    """What the brain makes of the super cluster's objects."""
    made = list(held)
    slices = [msgspec.convert(item, shapes.EndpointSlice) for item in made if item["kind"] == "EndpointSlice"]
    ports: list[ServicePort] = []
    for item in made:
        if item["kind"] == "Service":
            ports += compile_service(msgspec.convert(item, shapes.Service), slices, UNRESTRICTED).ports
    return ports


def state_of(configuration: Configuration, cast: Cast) -> NodeState:
    """The node's own facts under a configuration."""
    config = NodeConfiguration(
        detect_local=DetectLocal("ClusterCIDR", POD_CIDRS) if configuration.detector else DetectLocal("None"),
        masquerade_all=configuration.masquerade_all,
        node_port_addresses=NODE_PORT_ADDRESSES[configuration.node_ports],
    )
    primary = [parse_address(cast.address(NODE, ip)) for ip in (4, 6)]
    facts = NodeFacts(configuration.zone, tuple(sorted(primary)))
    return node_state(node_rules(config), facts, {*primary, *(parse_address(text) for text in cast.secondary.values())})


def interpret(plan: Plan, cast: Cast, configuration: Configuration, case: Case) -> Expectation:
    """What happens to a case's flow. A flow of several targets has one outcome: what they have in common."""
    scenario = case.scenario
    step = scenario.steps[case.step]
    held = objects(plan, cast, scenario, step)
    table = resolve(compiled(held), NodeView.of(cast.nodes["here"], configuration.zone_in(case.step)))
    state = state_of(configuration, cast)
    ranges = [
        *SERVICE_CIDRS,
        *(cidr for item in held if item["kind"] == "ServiceCIDR" for cidr in item["spec"]["cidrs"]),
    ]
    own = frozenset(parse_address(cast.address(NODE, ip)) for ip in (4, 6))
    found = set()
    for (address, port, protocol), target in zip(dialled(plan, cast, case), case.flow.targets, strict=True):
        holds = any(service.held and service.name == target.service for service in step.services)
        loops = case.flow.client == NODE and holds and target.kind == "LoadBalancer"
        source = address if loops else cast.address(case.flow.client, case.ip)
        packet = Packet(
            parse_address(source), parse_address(address), port, Protocol[protocol], case.flow.client == NODE, own
        )
        found.add(_named(cast, forward(table, state, packet, ranges)))
    outcome = found.pop()
    if found:
        return UNTOUCHED if not isinstance(case.expect, Verdict) else DROP  # never what a case expects
    if isinstance(outcome, To) and isinstance(case.expect, Apart):
        return Apart(outcome.hits) if outcome.sticky else outcome
    return outcome


@dataclass(frozen=True)
class _Chosen:
    targets: frozenset[tuple[bytes, int, bool]]
    sticky: bool


def forward(
    table: Sequence[ForwardedPort], node: NodeState, packet: Packet, ranges: Sequence[str] = SERVICE_CIDRS
) -> _Chosen | Verdict:
    """What the super cluster's table does with a packet, in the order of docs/dataplane.md."""
    family = 4 if len(packet.destination) == 4 else 6
    local = node.local_sources is not None and any(prefix.covers(packet.source) for prefix in node.local_sources)
    inside = local or packet.of_node
    public: list[tuple[ForwardedPort, ForwardedFrontend]] = []
    node_ports: list[tuple[ForwardedPort, ForwardedFrontend]] = []
    for port in table:
        for frontend in port.frontends:
            if port.key.protocol != packet.protocol or frontend.port != packet.port or frontend.family != family:
                continue
            if frontend.kind is FrontendKind.NODE_PORT:
                node_ports.append((port, frontend))
            elif frontend.address == packet.destination:
                if frontend.kind is FrontendKind.CLUSTER_IP:
                    return _chosen(port, frontend.inside, node, packet, frontend)
                public.append((port, frontend))
    if any(_walled(port, frontend, node, packet) for port, frontend in public):
        return DROP
    if packet.destination in node.node_addresses:
        public += node_ports
    for port, frontend in public:
        return _chosen(port, frontend.inside if inside else frontend.outside, node, packet, frontend)
    if packet.destination in _virtual_ips(table):
        return REJECT
    if any(parse_prefix(cidr).covers(packet.destination) for cidr in ranges):
        return DROP
    return UNTOUCHED


def _virtual_ips(table: Sequence[ForwardedPort]) -> set[bytes]:
    return {one.address for port in table for one in port.frontends if one.kind is FrontendKind.CLUSTER_IP}


def _walled(port: ForwardedPort, frontend: ForwardedFrontend, node: NodeState, packet: Packet) -> bool:
    """Whether a load balancer's source ranges keep a packet out; ranges of the other family wall nothing off."""
    if frontend.kind is not FrontendKind.LOAD_BALANCER:
        return False
    ranges = [prefix for prefix in port.source_ranges if len(prefix.address) == len(packet.source)]
    loops = packet.source == frontend.address and any(
        prefix.covers(address) for prefix in ranges for address in node.own_addresses
    )
    return bool(ranges) and not loops and not any(prefix.covers(packet.source) for prefix in ranges)


def _chosen(
    port: ForwardedPort, action: Action, node: NodeState, packet: Packet, frontend: ForwardedFrontend
) -> _Chosen | Verdict:
    if action in _VERDICTS:
        return _VERDICTS[action]
    octets = len(packet.destination)
    pool = port.pool(action, frontend.family)
    own = port.own4 if octets == 4 else port.own6
    own_addresses = {own[at : at + octets] for at in range(0, len(own), octets)}
    always = {
        Masquerade.NONLOCAL: node.masquerade_all
        or (node.local_sources is not None and not any(prefix.covers(packet.source) for prefix in node.local_sources)),
        Masquerade.ALWAYS: True,
        Masquerade.HOST: packet.of_node,
    }[frontend.masquerade]
    targets = set()
    for at in range(0, len(pool), octets + 2):
        address = pool[at : at + octets]
        hairpin = address == packet.source and address in own_addresses
        # What is delivered on the node itself never passes postrouting.
        leaves = packet.of_node or address not in packet.own
        number = int.from_bytes(pool[at + octets : at + octets + 2], "big")
        targets.add((address, number, (always or hairpin) and leaves))
    return _Chosen(frozenset(targets), port.affinity_seconds > 0)


def _named(cast: Cast, outcome: _Chosen | Verdict) -> Expectation:
    if not isinstance(outcome, _Chosen):
        return outcome
    hits = {Hit(f"{cast.role(format_address(address))}:{number}", seen) for address, number, seen in outcome.targets}
    return To(frozenset(hits), outcome.sticky)
