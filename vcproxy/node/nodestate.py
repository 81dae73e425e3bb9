"""The node's own facts as a backend wants them: from configuration, the brain's facts and the kernel's addresses. Pure.

As kube-proxy: NodePorts are accepted on the addresses of the Node object ("primary"), or on the kernel's addresses
inside the configured CIDRs, never on loopback; a source is local, and so dials ClusterIPs without masquerade, by the
ranges of the detector.
"""

import ipaddress
from collections.abc import Collection, Sequence

import msgspec

from vcproxy.backend.protocol import NodeState
from vcproxy.model.addresses import AddressError, Prefix, parse_prefix
from vcproxy.model.node import NodeFacts
from vcproxy.node.config import NodeConfiguration
from vcproxy.ops.configfile import ConfigError

PRIMARY = "primary"


class NodeRules(msgspec.Struct, frozen=True):
    """The parts of the configuration that make a NodeState, parsed. `detector` is the mode of DetectLocal."""

    primary: bool
    node_port_ranges: tuple[Prefix, ...]
    detector: str
    cluster_ranges: tuple[Prefix, ...]
    masquerade_all: bool


def node_rules(config: NodeConfiguration) -> NodeRules:
    """Parse the configured ranges. Raises ConfigError that names the field."""
    return NodeRules(
        primary=PRIMARY in config.node_port_addresses,
        node_port_ranges=_prefixes(
            "nodePortAddresses", [text for text in config.node_port_addresses if text != PRIMARY]
        ),
        detector=config.detect_local.mode,
        cluster_ranges=_prefixes("detectLocal.clusterCIDRs", config.detect_local.cluster_cidrs),
        masquerade_all=config.masquerade_all,
    )


def node_state(rules: NodeRules, facts: NodeFacts, local_addresses: Collection[bytes]) -> NodeState:
    """The backend's NodeState. `local_addresses`: all that the kernel has on its devices, 4 or 16 octets each.

    A detector without ranges (ClusterCIDR without clusterCIDRs, or a node that has no podCIDR yet) is no detector, as
    in kube-proxy: with an empty one every pod would be masqueraded.
    """
    accepted = set(facts.addresses) if rules.primary else set()
    accepted.update(
        address for address in local_addresses if any(prefix.covers(address) for prefix in rules.node_port_ranges)
    )
    ranges = {"ClusterCIDR": rules.cluster_ranges, "NodeCIDR": facts.pod_ranges}.get(rules.detector)
    return NodeState(
        node_addresses=tuple(sorted(address for address in accepted if not ipaddress.ip_address(address).is_loopback)),
        local_sources=ranges or None,
        masquerade_all=rules.masquerade_all,
        own_addresses=facts.addresses,
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


def _prefixes(field: str, texts: Sequence[str]) -> tuple[Prefix, ...]:
    try:
        return tuple(parse_prefix(text) for text in texts)
    except AddressError as error:
        raise ConfigError(f"{field}: {error}") from error
