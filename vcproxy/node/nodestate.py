"""The node's own facts as a backend wants them: from configuration, the brain's facts and the kernel's addresses. Pure.

As kube-proxy: NodePorts are accepted on the Node object's first address of each family ("primary"), and on the kernel's
addresses inside the configured CIDRs ("all": every one), never on loopback (see `localhost`); a client is local, and so
dials ClusterIPs without masquerade, by the ranges or the devices of the detector. Other than kube-proxy, which ends and
starts again, all of this follows the Node object and the kernel while running.
"""

import ipaddress
from collections.abc import Collection, Sequence

import msgspec

from vcproxy.backend.protocol import NodeState
from vcproxy.model.addresses import AddressError, Prefix, parse_address, parse_prefix
from vcproxy.model.node import NodeFacts
from vcproxy.node.config import DetectLocal, NodeConfiguration
from vcproxy.ops.configfile import ConfigError

PRIMARY, LOCALHOST, ALL = "primary", "localhost", "all"
_KEYWORDS = {ALL: ("0.0.0.0/0", "::/0"), LOCALHOST: ("127.0.0.0/8", "::1/128"), PRIMARY: ()}
LONGEST_INTERFACE = 15  # octets: IFNAMSIZ without its NUL


class NodeRules(msgspec.Struct, frozen=True):
    """The parts of the configuration that make a NodeState, parsed. `detector` is the mode of DetectLocal.

    `node_address`: the primary address of its family in place of the Node object's. `interfaces`: see NodeState.
    `deny_nodes`, `deny_other_pods`: where tenants' endpoints may not be (screen.py).
    """

    primary: bool
    node_address: bytes
    node_port_ranges: tuple[Prefix, ...]
    detector: str
    cluster_ranges: tuple[Prefix, ...]
    interfaces: tuple[str, ...]
    masquerade_all: bool
    deny_nodes: bool = True
    deny_other_pods: bool = True

    @property
    def localhost(self) -> tuple[int, ...]:
        """Families, 4 and 6, in which NodePorts are accepted on loopback: named as such, not just covered."""
        loopback = (prefix for prefix in self.node_port_ranges if ipaddress.ip_address(prefix.address).is_loopback)
        return tuple(sorted({4 if len(prefix.address) == 4 else 6 for prefix in loopback}))


def node_rules(config: NodeConfiguration) -> NodeRules:
    """Parse the configured ranges. Raises ConfigError that names the field."""
    ports = config.node_port_addresses
    texts = [cidr for text in ports for cidr in _KEYWORDS.get(text, (text,))]
    return NodeRules(
        primary=PRIMARY in ports,
        node_address=_address("nodeAddress", config.node_address) if config.node_address else b"",
        node_port_ranges=_prefixes("nodePortAddresses", texts),
        detector=config.detect_local.mode,
        cluster_ranges=_prefixes("detectLocal.clusterCIDRs", config.detect_local.cluster_cidrs),
        interfaces=_interfaces(config.detect_local),
        masquerade_all=config.masquerade_all,
        deny_nodes=not config.tenant_backends.node_addresses,
        deny_other_pods=not config.tenant_backends.other_tenants_pods,
    )


def node_state(rules: NodeRules, facts: NodeFacts, local_addresses: Collection[bytes]) -> NodeState:
    """The backend's NodeState. `local_addresses`: all that the kernel has on its devices, 4 or 16 octets each.

    A detector without ranges (ClusterCIDR without clusterCIDRs, or a node that has no podCIDR yet) is no detector, as
    in kube-proxy: with an empty one every pod would be masqueraded.
    """
    accepted = set(primary_addresses(rules, facts)) if rules.primary else set()
    accepted.update(
        address for address in local_addresses if any(prefix.covers(address) for prefix in rules.node_port_ranges)
    )
    ranges = {"ClusterCIDR": rules.cluster_ranges, "NodeCIDR": facts.pod_ranges}.get(rules.detector)
    return NodeState(
        node_addresses=tuple(sorted(address for address in accepted if not ipaddress.ip_address(address).is_loopback)),
        local_sources=ranges or None,
        local_interfaces=rules.interfaces,
        masquerade_all=rules.masquerade_all,
        own_addresses=(*facts.addresses, *([rules.node_address] if rules.node_address else ())),
    )


def listen_addresses(rules: NodeRules, state: NodeState, local_addresses: Collection[bytes]) -> tuple[bytes, ...]:
    """Where health-check node ports are accepted, sorted: the node port addresses that are on this node's devices.

    Where a family's node ports are accepted on all addresses, all zeros stand for them; that includes loopback, as in
    kube-proxy.
    """
    wildcards = {prefix.address for prefix in rules.node_port_ranges if prefix.length == 0}
    families = {len(address) for address in wildcards}
    found = {address for address in state.node_addresses if len(address) not in families and address in local_addresses}
    return tuple(sorted(wildcards | found))


def primary_addresses(rules: NodeRules, facts: NodeFacts) -> list[bytes]:
    """The node's address of each family: the configured one, else the Node object's first."""
    first = {len(address): address for address in (*reversed(facts.addresses), rules.node_address) if address}
    return list(first.values())


def _interfaces(config: DetectLocal) -> tuple[str, ...]:
    match config.mode:
        case "BridgeInterface":
            field, name, wildcard = "bridgeInterface", config.bridge_interface, ""
        case "InterfaceNamePrefix":
            field, name, wildcard = "interfaceNamePrefix", config.interface_name_prefix, "*"
        case _:
            return ()
    if not 0 < len(name.encode()) <= LONGEST_INTERFACE or set(name) & set("*/ \0\n\t"):
        raise ConfigError(
            f"detectLocal.{field}: {name!r} is no device name: 1 to {LONGEST_INTERFACE} octets, without space, / and *"
        )
    return (name + wildcard,)


def _address(field: str, text: str) -> bytes:
    try:
        return parse_address(text)
    except AddressError as error:
        raise ConfigError(f"{field}: {error}") from error


def _prefixes(field: str, texts: Sequence[str]) -> tuple[Prefix, ...]:
    try:
        return tuple(parse_prefix(text) for text in texts)
    except AddressError as error:
        raise ConfigError(f"{field}: {error}") from error
