"""What a conformance case is made of: plain frozen data that names pods and addresses by their roles.

A `Scenario` is a few Services with their endpoints, and the `Flow`s that are tried against them: who dials what, and
what must happen. What must happen is what kube-proxy does in nftables mode; a column runs kube-proxy itself, so that a
wrong expectation fails there. Every Service has, unless it says otherwise, both IP families, and every flow is tried
in both and over TCP and UDP: each of these is a case.

Nothing here knows an address. `objects` renders a scenario for a cast of pods, `interpreter` and the columns of
`e2e.conformance` say what happens.

    this node     the one whose proxy is tested; pods `client`, `local-1`, `local-2`
    other node    routes Service addresses through this node; pods `visitor`, `remote-1`, `remote-2`, `remote-3`
    outside       two clients that are no nodes: `outside`, and `blocked`, which load balancer source ranges leave out
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PODS = {
    "client": "here",
    "local-1": "here",
    "local-2": "here",
    "visitor": "there",
    "remote-1": "there",
    "remote-2": "there",
    "remote-3": "there",
}
"""Pods, and on which node they are."""
NODE = "node"
"""The host of this node, as a client and as an endpoint on the host's network."""
CLIENTS = (*PODS, NODE, "outside", "blocked")
FAMILIES = (4, 6)
PROTOCOLS = ("TCP", "UDP", "SCTP")
PORT, TARGET = 80, 8080


class Verdict(enum.Enum):
    """What happens to a flow that no endpoint gets."""

    REJECT = "reject"
    DROP = "drop"
    UNTOUCHED = "untouched"  # goes on as if there were no proxy

    def __str__(self) -> str:
        return self.value


REJECT, DROP, UNTOUCHED = Verdict


@dataclass(frozen=True, order=True)
class Hit:
    """One endpoint, "POD:PORT", and whether it sees the client's own address or the node's."""

    endpoint: str
    masqueraded: bool = False

    def __str__(self) -> str:
        return f"{self.endpoint}{' (masqueraded)' if self.masqueraded else ''}"


@dataclass(frozen=True)
class To:
    """A random one of these, each connection anew; `sticky`: always the same one of them."""

    hits: frozenset[Hit]
    sticky: bool = False

    def __or__(self, other: To) -> To:
        return To(self.hits | other.hits, self.sticky)

    def __str__(self) -> str:
        return f"{'one of ' if self.sticky else ''}{', '.join(map(str, sorted(self.hits)))}"


@dataclass(frozen=True)
class Apart:
    """Every one of a flow's targets sticks to one of these endpoints, and not all to the same."""

    hits: frozenset[Hit]

    def __str__(self) -> str:
        return f"by port one of {', '.join(map(str, sorted(self.hits)))}"


Expectation = To | Apart | Verdict


def to(*endpoints: str, masqueraded: bool = False, sticky: bool = False) -> To:
    """Endpoints "POD" (on its port 8080) or "POD:PORT", which see the client's own address."""
    named = (name if ":" in name else f"{name}:{TARGET}" for name in endpoints)
    return To(frozenset(Hit(name, masqueraded) for name in named), sticky)


def masqueraded(*endpoints: str, sticky: bool = False) -> To:
    """The same, which see an address of the node."""
    return to(*endpoints, masqueraded=True, sticky=sticky)


# --- objects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Endpoint:
    """An endpoint of a slice. `on`: "here", "there", "" for none or None for where its pod is. Hints name zones
    literally; nodes as "here" or "there".
    """

    pod: str
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None
    hint_zones: tuple[str, ...] = ()
    hint_nodes: tuple[str, ...] = ()
    on: str | None = None


READY: Mapping[str, bool] = {"ready": True, "serving": True, "terminating": False}
UNREADY: Mapping[str, bool] = {"ready": False, "serving": False, "terminating": False}
LEAVING: Mapping[str, bool] = {"ready": False, "serving": True, "terminating": True}
GONE: Mapping[str, bool] = {"ready": False, "serving": False, "terminating": True}


@dataclass(frozen=True)
class Port:
    """A port of a Service: for each protocol one, named NAME-PROTOCOL, all with this number and target. `name` may be
    empty where there is one protocol. `node_port`: whether it has one.
    """

    number: int = PORT
    target: int = TARGET
    name: str = "http"
    protocols: tuple[str, ...] = PROTOCOLS
    node_port: bool = True

    def called(self, protocol: str) -> str:
        return f"{self.name}-{protocol.lower()}" if self.name else ""


@dataclass(frozen=True)
class Slice:
    """EndpointSlices of a Service, one a family. `ports`: None for all of the Service's, else (name, protocol, number),
    each as the object would have it. `families`: of addresses; `declared`: addressType in place of the family's.
    """

    endpoints: tuple[Endpoint, ...] = ()
    ports: tuple[tuple[str | None, str, int | None], ...] | None = None
    families: tuple[int, ...] = FAMILIES
    declared: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    service: str | None = None
    """The Service it names; None for the one it is given with, "" for none."""


@dataclass(frozen=True)
class Ingress:
    """An address of a load balancer in both families, or a host name, or that very address."""

    mode: str | None = None
    hostname: str = ""
    literal: str = ""


@dataclass(frozen=True)
class Service:
    """A Service without selector, and its slices.

    `external_ips`: how many; `source_ranges`: roles of CLIENTS whose addresses make ranges, padded with blanks if
    `padded`; `held`: the node has the load balancer's addresses on its loopback device; `legacy`: addresses are written
    with leading zeros, as old objects may have them. `spec`: what else is to be in the spec.
    """

    slices: tuple[Slice, ...] = ()
    name: str = "web"
    type: str = "ClusterIP"
    ports: tuple[Port, ...] = (Port(),)
    families: tuple[int, ...] = FAMILIES
    external_ips: int = 0
    ingress: tuple[Ingress, ...] = ()
    source_ranges: tuple[str, ...] = ()
    padded: bool = False
    held: bool = False
    legacy: bool = False
    headless: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)


INTERPRETER, SUPER, OVERLAY, FLAT, KUBE_PROXY = COLUMNS = ("interpreter", "super", "overlay", "flat", "kube-proxy")


# --- flows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What a client dials.

    `kind`: ClusterIP, ExternalIP, LoadBalancer (address `number` of several), NodePort (on this node's address),
    Secondary (the node port on this node's second address), Node (this node's address and that very port), or Unallocated (an address that no Service has in the range
    of ClusterIPs). `port`: the Service's port number that is meant. `protocol`: if another than the case's.
    """

    kind: str
    port: int = PORT
    service: str = "web"
    number: int = 0
    protocol: str = ""
    literal: str = ""

    def __str__(self) -> str:
        return "".join(
            (
                {
                    "Secondary": "NodePort on the second address",
                    "Unallocated": "unallocated IP",
                    "ExtraRange": "unallocated IP of another range",
                    "Literal": self.literal,
                }.get(self.kind, self.kind),
                f" {self.number + 1}" if self.number else "",
                f" of {self.service}" if self.service != "web" else "",
                f" port {self.port}" if self.port != PORT else "",
                f" by {self.protocol}" if self.protocol else "",
            )
        )


CLUSTER_IP = Target("ClusterIP")
NODE_PORT = Target("NodePort")
EXTERNAL_IP = Target("ExternalIP")
LOAD_BALANCER = Target("LoadBalancer")
SECONDARY = Target("Secondary")
UNALLOCATED = Target("Unallocated")
VIRTUAL = {"ClusterIP", "Unallocated", "ExtraRange"}
"""Kinds of targets that mean something in a tenant's own zone only."""


@dataclass(frozen=True)
class Flow:
    """A client dials a target (or several in turn), and this must happen. `otherwise`: what must happen under a
    configuration that is named, instead. `columns`: fewer than the scenario's, where one cannot tell. `held`: one
    connection (UDP: one source port) over all steps of the scenario, opened by the first that names it.
    """

    client: str
    target: Target | tuple[Target, ...]
    expect: Expectation
    otherwise: Mapping[str, Expectation] = field(default_factory=dict)
    columns: tuple[str, ...] = COLUMNS
    held: bool = False

    @property
    def targets(self) -> tuple[Target, ...]:
        return self.target if isinstance(self.target, tuple) else (self.target,)

    @property
    def target_kinds(self) -> set[str]:
        return {target.kind for target in self.targets}

    @property
    def name(self) -> str:
        return f"{self.client} {'goes on ' if self.held else ''}to {' and '.join(map(str, self.targets))}"

    def expected(self, configuration: str) -> Expectation:
        return self.otherwise.get(configuration, self.expect)


@dataclass(frozen=True)
class Step:
    """Services as they are now, and what flows then do. `after`: what has happened, in words; "" for the first.
    `extra_range`: there is a second range of ClusterIPs.
    """

    services: tuple[Service, ...]
    flows: tuple[Flow, ...]
    after: str = ""
    extra_range: bool = False


@dataclass(frozen=True)
class Scenario:
    """Steps in order, under each of the configurations. `columns`: where it makes sense; `why`: if not everywhere."""

    family: str
    name: str
    steps: tuple[Step, ...]
    configurations: tuple[str, ...] = ("base",)
    families: tuple[int, ...] = FAMILIES
    protocols: tuple[str, ...] = PROTOCOLS
    columns: tuple[str, ...] = COLUMNS
    why: str = ""


def scenario(family: str, name: str, service: Service | tuple[Service, ...], *flows: Flow, **more: Any) -> Scenario:
    """A scenario of one step."""
    services = service if isinstance(service, tuple) else (service,)
    return Scenario(family, name, (Step(services, flows),), **more)


@dataclass(frozen=True)
class Configuration:
    """How the proxy is configured, and its node. `zone`: the Node's topology label, "" for none. `node_ports`: where
    NodePorts are accepted: "primary", "all" or "second" (the second address only).
    """

    name: str
    detector: bool = True
    masquerade_all: bool = False
    node_ports: str = "primary"
    zone: str = "zone-a"
    later: tuple[str, ...] = ()
    """Its label in the steps behind the first."""

    def zone_in(self, step: int) -> str:
        return (self.zone, *self.later)[min(step, len(self.later))]


CONFIGURATIONS = {
    made.name: made
    for made in (
        Configuration("base"),
        Configuration("no detector", detector=False, zone=""),
        Configuration("masquerade all", masquerade_all=True, zone="zone-c"),
        Configuration("masquerade all, no detector", detector=False, masquerade_all=True, node_ports="all"),
        Configuration("second address", node_ports="second"),
        Configuration("zone label changes", later=("zone-b", "", "zone-a")),
    )
}
MASQUERADES = tuple(CONFIGURATIONS)[:4]


@dataclass(frozen=True, order=True)
class Case:
    """One flow in one family and protocol under one configuration: a row of the table. Numbers are positions."""

    scenario: Scenario = field(compare=False)
    configuration: str
    step: int
    flow: Flow = field(compare=False)
    ip: int
    protocol: str
    id: str

    @property
    def expect(self) -> Expectation:
        return self.flow.expected(self.configuration)

    def in_column(self, column: str) -> bool:
        """Whether the flow makes sense there. In a tenant's zone only its pods on this node dial ClusterIPs; its public
        addresses are there on the flat network only, for all but the node (whose zone is the super cluster's).
        """
        if column not in self.scenario.columns or column not in self.flow.columns:
            return False
        if column not in (OVERLAY, FLAT):
            return True
        if self.flow.client == NODE:
            return False
        virtual = self.flow.target_kinds & VIRTUAL
        public = self.flow.target_kinds - VIRTUAL
        here = PODS.get(self.flow.client) == "here"
        # What nobody forwards, an overlay's own routes refuse, and Linux rations that.
        routed = column == FLAT or not (public or self.flow.target_kinds & {"ExtraRange"})
        return (here or not virtual) and routed


def cases_of(scenario: Scenario) -> list[Case]:
    """All cases of a scenario, in order."""
    found = []
    for configuration in scenario.configurations:
        for number, step in enumerate(scenario.steps):
            for flow in step.flows:
                for ip in scenario.families:
                    for protocol in scenario.protocols:
                        if flow.held and protocol == "SCTP":
                            continue  # the lab's SCTP ends where an association would begin
                        parts = [scenario.family, scenario.name, step.after, flow.name, f"IPv{ip}", protocol]
                        if len(scenario.configurations) > 1 or configuration != "base":
                            parts.append(configuration)
                        name = "/".join(part for part in parts if part)
                        found.append(Case(scenario, configuration, number, flow, ip, protocol, name))
    return found
