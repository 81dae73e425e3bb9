"""A Service in compiled form, all but its endpoints: the frontends and policies of its service ports.

Which Services count, and how their fields are read, is kube-proxy's: pkg/proxy/servicechangetracker.go, serviceport.go
and util/utils.go at 1.37, each rule named where it is applied. The guard is asked about every address and node port;
what it refuses is left out and recorded, the rest of the Service goes on. A field without which the Service has no
safe meaning raises Unusable.
"""

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from vcproxy.brain.guard import (
    Policy,
    Reason,
    Refusals,
    Unusable,
    judge_external_ip,
    judge_port,
    judge_virtual_ip,
)
from vcproxy.brain.slices import LONGEST_NAME, parse_protocol
from vcproxy.kube import shapes
from vcproxy.model.addresses import AddressError, Prefix, never_allowed, parse_address, parse_prefix
from vcproxy.model.services import Frontend, FrontendKind, PortKey, ServicePort

SERVICE_PROXY_NAME = "service.kubernetes.io/service-proxy-name"
DEFAULT_AFFINITY_SECONDS = 10_800
LONGEST_AFFINITY_SECONDS = 86_400
LONGEST_PORT_NAME = 63

_ANY_NODE = {4: bytes(4), 6: bytes(16)}
_FAMILY_NAMES = {4: "IPv4", 6: "IPv6"}


def frame(service: shapes.Service, policy: Policy, refusals: Refusals) -> tuple[ServicePort, ...]:
    """All of a Service's ports but their endpoints; empty if no proxy is to serve it.

    That is: label service.kubernetes.io/service-proxy-name (any value: somebody else serves it), clusterIP "" or
    "None" (headless), type ExternalName. A port whose every frontend was refused is left out. Raises Unusable.
    """
    spec = service.spec
    if (
        SERVICE_PROXY_NAME in service.metadata.labels
        or spec.cluster_ip in ("", "None")
        or spec.type == "ExternalName"
        or not (cluster_ips := _cluster_ips(spec))
    ):
        return ()
    virtual = _virtual(cluster_ips, policy, refusals)
    public = sorted(_public(service, frozenset(cluster_ips), policy, refusals))
    ranges = _source_ranges(spec.load_balancer_source_ranges)
    affinity = _affinity(spec)
    health_port = _health_check_node_port(spec, policy, refusals)
    ports: dict[PortKey, ServicePort] = {}
    for port in spec.ports:
        key = _port_key(service, port, refusals)
        if key is None:
            continue
        if key in ports:
            raise Unusable("spec.ports", port.name, cure="give ports of one protocol different names")
        frontends = [
            *(Frontend(FrontendKind.CLUSTER_IP, address, port.port) for address in virtual),
            *(Frontend(kind, address, port.port) for kind, address in public),
            *_node_ports(port, sorted(cluster_ips), policy, refusals),
        ]
        balanced = any(frontend.kind is FrontendKind.LOAD_BALANCER for frontend in frontends)
        ports[key] = ServicePort(
            key,
            tuple(sorted(frontends)),
            internal_local=spec.internal_traffic_policy == "Local",
            external_local=spec.external_traffic_policy == "Local" and _externally_accessible(spec),
            affinity_seconds=affinity,
            source_ranges=ranges if balanced else (),
            health_check_node_port=health_port,
        )
    return tuple(ports[key] for key in sorted(ports) if ports[key].frontends)


def aliased(ports: Iterable[ServicePort], addresses: Sequence[bytes]) -> tuple[ServicePort, ...]:
    """The same ports, that answer on these further virtual addresses too, where they have a ClusterIP of that family.

    What the super cluster itself says of a Service is no wish of the tenant: the guard has no part in it but for what
    nobody may use.
    """
    usable = [address for address in addresses if not never_allowed(address)]
    return tuple(_aliased(port, usable) for port in ports)


def _aliased(port: ServicePort, addresses: Sequence[bytes]) -> ServicePort:
    own = {frontend.family: frontend for frontend in port.frontends if frontend.kind is FrontendKind.CLUSTER_IP}
    further = [
        Frontend(FrontendKind.CLUSTER_IP, address, own[family].port)
        for address in addresses
        if (family := 4 if len(address) == 4 else 6) in own and address != own[family].address
    ]
    if not further:
        return port
    return msgspec.structs.replace(port, frontends=tuple(sorted((*port.frontends, *further))))


def _cluster_ips(spec: shapes.ServiceSpec) -> Mapping[int, bytes]:
    """Family -> ClusterIP (kube-proxy's GetClusterIPByFamily). No address of a family: not served in that family.

    clusterIPs[i] is of ipFamilies[i]; without ipFamilies (API servers before dual stack) clusterIP stands alone.
    """
    if not spec.ip_families:
        address = _address(spec.cluster_ip, "spec.clusterIP")
        return {4 if len(address) == 4 else 6: address}
    found: dict[int, bytes] = {}
    for family, octets in ((4, 4), (6, 16)):
        name = _FAMILY_NAMES[family]
        position = spec.ip_families.index(name) if name in spec.ip_families else len(spec.cluster_ips)
        if position >= len(spec.cluster_ips):
            continue
        text = spec.cluster_ips[position]
        address = _address(text, f"spec.clusterIPs[{position}]")
        if len(address) != octets:
            raise Unusable(f"spec.clusterIPs[{position}]", text, cure=f"ipFamilies[{position}] says {name}")
        found[family] = address
    return found


def _address(text: str, field: str) -> bytes:
    try:
        return parse_address(text)
    except AddressError:
        raise Unusable(field, text, cure="write an IP address") from None


def _virtual(cluster_ips: Mapping[int, bytes], policy: Policy, refusals: Refusals) -> list[bytes]:
    allowed: list[bytes] = []
    for address in cluster_ips.values():
        reason = judge_virtual_ip(address, policy)
        if reason is None:
            allowed.append(address)
        else:
            refusals.add_address("spec.clusterIPs", reason, address)
    return allowed


def _public(
    service: shapes.Service, families: frozenset[int], policy: Policy, refusals: Refusals
) -> set[tuple[FrontendKind, bytes]]:
    """External and load-balancer IPs of the Service's own families.

    An ingress counts if its ipMode is VIP or not said (KEP-1860): with Proxy the load balancer dials node ports.
    """
    asked = [(FrontendKind.EXTERNAL_IP, "spec.externalIPs", text) for text in service.spec.external_ips]
    for ingress in service.status.load_balancer.ingress:
        if ingress.ip and ingress.ip_mode in (None, "VIP"):
            asked.append((FrontendKind.LOAD_BALANCER, "status.loadBalancer.ingress[].ip", ingress.ip))
    allowed: set[tuple[FrontendKind, bytes]] = set()
    for kind, field, text in asked:
        try:
            address = parse_address(text)
        except AddressError:
            refusals.add(field, Reason.MALFORMED, text, cure="write an IP address")
            continue
        if (4 if len(address) == 4 else 6) not in families:
            continue
        reason = judge_external_ip(address, policy, kind)
        if reason is None:
            allowed.add((kind, address))
        else:
            refusals.add_address(field, reason, address)
    return allowed


def _node_ports(
    port: shapes.ServicePort, families: Iterable[int], policy: Policy, refusals: Refusals
) -> list[Frontend]:
    if not port.node_port:
        return []
    if reason := judge_port(port.node_port, policy.node_ports):
        refusals.add("spec.ports[].nodePort", reason, str(port.node_port))
        return []
    return [Frontend(FrontendKind.NODE_PORT, _ANY_NODE[family], port.node_port) for family in families]


def _port_key(service: shapes.Service, port: shapes.ServicePort, refusals: Refusals) -> PortKey | None:
    namespace, name = service.key
    protocol = parse_protocol(port.protocol)
    if protocol is None:
        refusals.add("spec.ports[].protocol", Reason.MALFORMED, port.protocol, cure="use TCP, UDP or SCTP")
        return None
    if not port.port:
        refusals.add("spec.ports[].port", Reason.MALFORMED, "0", cure="use 1 to 65535")
        return None
    if len(port.name) > LONGEST_PORT_NAME:
        raise Unusable("spec.ports[].name", port.name, cure=f"use at most {LONGEST_PORT_NAME} characters")
    if len(namespace) > LONGEST_NAME:
        raise Unusable("metadata.namespace", namespace, cure=f"use at most {LONGEST_NAME} characters")
    return PortKey(namespace, name, port.name, protocol)


def _source_ranges(texts: Iterable[str]) -> tuple[Prefix, ...]:
    """An unreadable range makes the Service unusable: leaving it out could open what the others close."""
    found: set[Prefix] = set()
    for text in texts:
        try:
            found.add(parse_prefix(text))
        except AddressError:
            raise Unusable("spec.loadBalancerSourceRanges", text, cure="write a CIDR") from None
    return tuple(sorted(found))


def _affinity(spec: shapes.ServiceSpec) -> int:
    if spec.session_affinity != "ClientIP":
        return 0
    config = spec.session_affinity_config
    said = config.client_ip.timeout_seconds if config and config.client_ip else None
    seconds = DEFAULT_AFFINITY_SECONDS if said is None else said
    if not 0 < seconds <= LONGEST_AFFINITY_SECONDS:
        field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
        raise Unusable(field, str(seconds), cure=f"use 1 to {LONGEST_AFFINITY_SECONDS}")
    return seconds


def _health_check_node_port(spec: shapes.ServiceSpec, policy: Policy, refusals: Refusals) -> int:
    """The port where a load balancer asks; 0: none (k8s.io/kubernetes pkg/api/v1/service NeedsHealthCheck).

    It is a port on the shared nodes' own addresses as any node port is, and granted as one.
    """
    asked = spec.health_check_node_port
    if not asked or spec.type != "LoadBalancer" or spec.external_traffic_policy != "Local":
        return 0
    if reason := judge_port(asked, policy.health_check_node_ports):
        refusals.add("spec.healthCheckNodePort", reason, str(asked))
        return 0
    return asked


def _externally_accessible(spec: shapes.ServiceSpec) -> bool:
    """Where externalTrafficPolicy means something (k8s.io/kubernetes pkg/api/v1/service ExternallyAccessible)."""
    return spec.type in ("LoadBalancer", "NodePort") or (spec.type == "ClusterIP" and bool(spec.external_ips))
