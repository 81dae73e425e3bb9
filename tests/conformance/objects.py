"""Scenarios as Kubernetes objects, for a cast: who has which address on which node.

Every address and port is written out, none is left to the API server: the same objects mean the same in manifests, in
a real API server and in the interpreter. Numbers come from a scenario's place in the table, so all scenarios can be in
one cluster at once.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.conformance.model import CLIENTS, FAMILIES, NODE, PODS, Case, Endpoint, Port, Scenario, Service, Slice, Step

Object = dict[str, Any]

SERVICE_CIDRS = ("10.32.0.0/16", "fd00:32::/108")
PUBLIC_CIDRS = ("198.18.0.0/16", "2001:db8:18::/64")
"""Where external and load-balancer addresses come from (RFC 2544 and RFC 3849: nobody has them)."""
EXTRA_CIDRS = ("10.33.0.0/16", "fd00:33::/32")
"""Of these steps may make ranges of ClusterIPs."""
LITERAL_CIDRS = ("169.254.7.0/24",)

_NAMES = {4: "IPv4", 6: "IPv6"}
_FIRST_NODE_PORT, _FIRST_HEALTH_PORT = 30_000, 32_300


@dataclass(frozen=True)
class Cast:
    """Addresses of PODS, node, outside and blocked by family; names of the nodes "here" and "there"; the second
    addresses of this node.
    """

    addresses: Mapping[str, Mapping[int, str]]
    nodes: Mapping[str, str]
    secondary: Mapping[int, str]

    def address(self, role: str, ip: int) -> str:
        return self.addresses[role][ip]

    def role(self, address: str) -> str:
        """Whose address this is, the address itself if nobody's."""
        same = ipaddress.ip_address(address)
        for role, held in self.addresses.items():
            if same in map(ipaddress.ip_address, held.values()):
                return role
        return address


class Plan:
    """The numbers that every Service of a table has."""

    def __init__(self, scenarios: Sequence[Scenario]) -> None:
        self._scenarios = {(one.family, one.name): number for number, one in enumerate(scenarios)}
        if len(self._scenarios) < len(scenarios):
            raise ValueError("two scenarios have one name")
        self._services: dict[tuple[str, str, str], int] = {}
        self._node_ports: dict[tuple[str, str, str, int], int] = {}
        for one in scenarios:
            for service in (service for step in one.steps for service in step.services):
                self._services.setdefault((one.family, one.name, service.name), len(self._services) + 1)
                for port in service.ports:
                    if port.node_port and service.type in ("NodePort", "LoadBalancer"):
                        key = (one.family, one.name, service.name, port.number)
                        self._node_ports.setdefault(key, _FIRST_NODE_PORT + len(self._node_ports))
        if _FIRST_NODE_PORT + len(self._node_ports) > _FIRST_HEALTH_PORT:
            raise ValueError("more node ports than Kubernetes has by default")

    def namespace(self, scenario: Scenario) -> str:
        """A namespace of its own for every scenario."""
        words = re.sub(r"[^a-z0-9]+", "-", f"{scenario.family}-{scenario.name}".lower())[:50]
        return f"c{self._scenarios[scenario.family, scenario.name]:03d}-{words.strip('-')}"

    def number(self, scenario: Scenario, service: str) -> int:
        return self._services[scenario.family, scenario.name, service]

    def node_port(self, scenario: Scenario, service: str, port: int) -> int:
        return self._node_ports[scenario.family, scenario.name, service, port]

    def cluster_ip(self, scenario: Scenario, service: str, ip: int) -> str:
        number = self.number(scenario, service)
        return f"10.32.{1 + number // 256}.{number % 256}" if ip == 4 else f"fd00:32::1:{number:x}"

    def public(self, scenario: Scenario, service: str, kind: str, number: int, ip: int) -> str:
        """The `number`-th external IP or load-balancer address of a Service; up to four each."""
        place = 8 * self.number(scenario, service) + (4 if kind == "LoadBalancer" else 0) + number
        return f"198.18.{place // 256}.{place % 256}" if ip == 4 else f"2001:db8:18::{place:x}"

    def extra_range(self, scenario: Scenario) -> tuple[str, str]:
        """A range of ClusterIPs that only this scenario may add, in both families."""
        number = self._scenarios[scenario.family, scenario.name]
        return f"10.33.{number}.0/24", f"fd00:33:0:{number:x}::/64"

    def unallocated(self, scenario: Scenario, ip: int) -> str:
        number = 1 + self._scenarios[scenario.family, scenario.name]
        return f"10.32.250.{number}" if ip == 4 else f"fd00:32::e:{number:x}"


def dialled(plan: Plan, cast: Cast, case: Case) -> list[tuple[str, int, str]]:
    """Address, port and protocol of each of a case's targets."""
    found = []
    scenario, ip = case.scenario, case.ip
    for target in case.flow.targets:
        port = target.port
        match target.kind:
            case "ClusterIP":
                address = plan.cluster_ip(scenario, target.service, ip)
            case "NodePort" | "Secondary":
                address = cast.address(NODE, ip) if target.kind == "NodePort" else cast.secondary[ip]
                port = plan.node_port(scenario, target.service, target.port)
            case "Node":
                address = cast.address(NODE, ip)
            case "Literal":
                address = target.literal
            case "ExtraRange":
                address = str(next(ipaddress.ip_network(plan.extra_range(scenario)[ip == 6]).hosts()))
            case "Unallocated":
                address = plan.unallocated(scenario, ip)
            case _:
                address = plan.public(scenario, target.service, target.kind, target.number, ip)
        found.append((address, port, target.protocol or case.protocol))
    return found


def objects(plan: Plan, cast: Cast, scenario: Scenario, step: Step) -> list[Object]:
    """Services, with their status, EndpointSlices and ServiceCIDRs of a step."""
    made = [made for service in step.services for made in _objects(plan, cast, scenario, service)]
    if step.extra_range:
        made.append(service_cidr(plan.namespace(scenario), plan.extra_range(scenario)))
    return made


def service_cidr(name: str, ranges: Sequence[str]) -> Object:
    """A range of ClusterIPs in both families."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": name},
        "spec": {"cidrs": list(ranges)},
    }


def _objects(plan: Plan, cast: Cast, scenario: Scenario, service: Service) -> Iterator[Object]:
    namespace = plan.namespace(scenario)
    yield {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": service.name, "namespace": namespace, "labels": dict(service.labels)},
        "spec": _spec(plan, cast, scenario, service),
        "status": {"loadBalancer": {"ingress": list(_ingress(plan, scenario, service))}},
    }
    for number, held in enumerate(service.slices):
        for ip in held.families:
            owner = service.name if held.service is None else held.service
            yield {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": f"{service.name}-{number}-{ip}",
                    "namespace": namespace,
                    "labels": ({"kubernetes.io/service-name": owner} if owner else {}) | dict(held.labels),
                },
                "addressType": held.declared or _NAMES[ip],
                "ports": [_without_none(name=n, protocol=p, port=number) for n, p, number in _ports(service, held)],
                "endpoints": [_endpoint(cast, endpoint, ip, service.legacy) for endpoint in held.endpoints],
            }


def _spec(plan: Plan, cast: Cast, scenario: Scenario, service: Service) -> Object:
    if service.type == "ExternalName":
        return {"type": "ExternalName", "externalName": "example.com", **service.spec}
    exposed = service.type in ("NodePort", "LoadBalancer")
    ips = ["None"] if service.headless else [plan.cluster_ip(scenario, service.name, ip) for ip in service.families]
    external = [
        plan.public(scenario, service.name, "ExternalIP", number, ip)
        for number in range(service.external_ips)
        for ip in FAMILIES
    ]
    ranges = [f"{cast.address(role, ip)}/{32 if ip == 4 else 128}" for role in service.source_ranges for ip in FAMILIES]
    spec: Object = {
        "type": service.type,
        "clusterIP": _written(ips[0], service.legacy),
        "clusterIPs": [_written(ip, service.legacy) for ip in ips],
        "ipFamilies": [_NAMES[ip] for ip in service.families],
        "ipFamilyPolicy": "SingleStack" if len(service.families) == 1 else "RequireDualStack",
        "internalTrafficPolicy": "Cluster",
        "sessionAffinity": "None",
        "ports": [
            _without_none(
                name=port.called(protocol) or None,
                protocol=protocol,
                port=port.number,
                targetPort=port.target,
                nodePort=plan.node_port(scenario, service.name, port.number) if exposed and port.node_port else None,
            )
            for port in service.ports
            for protocol in port.protocols
        ],
    }
    if external:
        spec["externalIPs"] = [_written(ip, service.legacy) for ip in external]
    if exposed or external:
        spec["externalTrafficPolicy"] = "Cluster"
    if ranges:
        spec["loadBalancerSourceRanges"] = [f" {text} " if service.padded else text for text in ranges]
    spec |= service.spec
    if service.type == "LoadBalancer" and spec["externalTrafficPolicy"] == "Local":
        spec["healthCheckNodePort"] = _FIRST_HEALTH_PORT + plan.number(scenario, service.name)
    return spec


def _ingress(plan: Plan, scenario: Scenario, service: Service) -> Iterator[Object]:
    for number, ingress in enumerate(service.ingress):
        if ingress.hostname:
            yield {"hostname": ingress.hostname}
            continue
        if ingress.literal:
            yield {"ip": ingress.literal}
            continue
        for ip in FAMILIES:
            address = _written(plan.public(scenario, service.name, "LoadBalancer", number, ip), service.legacy)
            yield _without_none(ip=address, ipMode=ingress.mode)


def _ports(service: Service, held: Slice) -> Iterator[tuple[str | None, str, int | None]]:
    if held.ports is not None:
        yield from held.ports
        return
    for port in service.ports:
        for protocol in port.protocols:
            yield port.called(protocol), protocol, port.target


def _endpoint(cast: Cast, endpoint: Endpoint, ip: int, legacy: bool) -> Object:
    where = (PODS | {NODE: "here"})[endpoint.pod] if endpoint.on is None else endpoint.on
    hints = _without_none(
        forZones=[{"name": zone} for zone in endpoint.hint_zones] or None,
        forNodes=[{"name": cast.nodes[node]} for node in endpoint.hint_nodes] or None,
    )
    return _without_none(
        addresses=[_written(cast.address(endpoint.pod, ip), legacy)],
        conditions=_without_none(ready=endpoint.ready, serving=endpoint.serving, terminating=endpoint.terminating),
        nodeName=cast.nodes[where] if where else None,
        hints=hints or None,
    )


def _written(address: str, legacy: bool) -> str:
    """IPv4 with leading zeros, as Kubernetes once took it."""
    if not legacy or ":" in address:
        return address
    return ".".join(octet.zfill(3) for octet in address.split("."))


def _without_none(**fields: Any) -> Object:
    return {name: value for name, value in fields.items() if value is not None}


@functools.cache
def lab_cast() -> Cast:
    """Addresses as the lab gives them to the super cluster's pods: what the interpreter works with."""
    return cast_of(
        {
            role: {
                4: f"10.200.{1 if where == 'here' else 2}.{number}",
                6: f"fd00:200:0:{1 if where == 'here' else 2}::{number:x}",
            }
            for number, (role, where) in enumerate(PODS.items(), start=2)
        }
    )


def cast_of(pods: Mapping[str, Mapping[int, str]]) -> Cast:
    """The cast of these pods, with everybody else where the lab has them: see Lab.node."""
    others = {
        NODE: {4: "192.168.77.11", 6: "fd77::11"},
        "outside": {4: "192.168.77.200", 6: "fd77::200"},
        "blocked": {4: "192.168.77.201", 6: "fd77::201"},
    }
    assert {*pods, *others} == set(CLIENTS)
    return Cast({**pods, **others}, {"here": "one", "there": "two"}, {4: "192.168.77.111", 6: "fd77::111"})


def port(number: int, target: int, **more: Any) -> Port:
    """A port whose name tells its number."""
    return Port(number, target, f"p{number}", **more)
