"""The node's own facts as a backend gets them: where NodePorts are accepted, and which clients are local."""

import pytest

from vcproxy.model.addresses import parse_address, parse_prefix
from vcproxy.model.node import NodeFacts
from vcproxy.node.config import DetectLocal, NodeConfiguration
from vcproxy.node.nodestate import node_rules, node_state
from vcproxy.ops.configfile import ConfigError

FACTS = NodeFacts(
    addresses=tuple(map(parse_address, ("192.168.0.2", "203.0.113.2", "fd00::2"))),
    pod_ranges=(parse_prefix("10.0.1.0/24"),),
)
KERNEL = [
    parse_address(text)
    for text in (
        "192.168.0.2",
        "203.0.113.2",
        "192.168.1.2",
        "10.9.0.1",
        "127.0.0.1",
        "127.0.0.2",
        "::1",
        "fd00::2",
        "fe80::1",
    )
]


@pytest.mark.parametrize(
    ("accepted", "override", "addresses", "localhost"),
    [
        # The Node object's first address of each family: an external one beside an internal one is not primary.
        (("primary",), "", ["192.168.0.2", "fd00::2"], ()),
        (("primary",), "192.168.1.2", ["192.168.1.2", "fd00::2"], ()),
        (("primary",), "fe80::1", ["192.168.0.2", "fe80::1"], ()),
        (("192.168.0.0/16",), "", ["192.168.0.2", "192.168.1.2"], ()),
        (("primary", "10.0.0.0/8"), "", ["10.9.0.1", "192.168.0.2", "fd00::2"], ()),
        (("all",), "", ["10.9.0.1", "192.168.0.2", "192.168.1.2", "203.0.113.2", "fd00::2", "fe80::1"], ()),
        (("0.0.0.0/0",), "", ["10.9.0.1", "192.168.0.2", "192.168.1.2", "203.0.113.2"], ()),
        (("localhost",), "", [], (4, 6)),
        (("primary", "localhost"), "", ["192.168.0.2", "fd00::2"], (4, 6)),
        (("127.0.0.0/8", "fd00::/8"), "", ["fd00::2"], (4,)),
        ((), "", [], ()),
    ],
    ids=str,
)
def test_where_node_ports_are_accepted(
    accepted: tuple[str, ...], override: str, addresses: list[str], localhost: tuple[int, ...]
) -> None:
    rules = node_rules(NodeConfiguration(node_port_addresses=accepted, node_address=override))
    assert set(node_state(rules, FACTS, KERNEL).node_addresses) == set(map(parse_address, addresses))
    assert rules.localhost == localhost


@pytest.mark.parametrize(
    ("detector", "sources", "interfaces"),
    [
        (DetectLocal(mode="ClusterCIDR", cluster_cidrs=("10.0.0.0/16",)), (parse_prefix("10.0.0.0/16"),), ()),
        (DetectLocal(mode="NodeCIDR"), FACTS.pod_ranges, ()),
        (DetectLocal(mode="BridgeInterface", bridge_interface="cni0"), None, ("cni0",)),
        (DetectLocal(mode="InterfaceNamePrefix", interface_name_prefix="veth"), None, ("veth*",)),
        (DetectLocal(mode="None"), None, ()),
    ],
    ids=lambda value: value.mode if isinstance(value, DetectLocal) else "",
)
def test_who_is_local(detector: DetectLocal, sources: object, interfaces: tuple[str, ...]) -> None:
    found = node_state(node_rules(NodeConfiguration(detect_local=detector)), FACTS, ())
    assert found.local_sources == sources
    assert found.local_interfaces == interfaces


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NodeConfiguration(node_port_addresses=("prmary",)), "nodePortAddresses: 'prmary'"),
        (NodeConfiguration(node_address="me"), "nodeAddress: 'me' is not an IP address"),
        (NodeConfiguration(detect_local=DetectLocal(mode="BridgeInterface")), "detectLocal.bridgeInterface: '' is no device name"),
        (NodeConfiguration(detect_local=DetectLocal(mode="InterfaceNamePrefix", interface_name_prefix="veth*")), "detectLocal.interfaceNamePrefix: 'veth\\*'"),
        (NodeConfiguration(detect_local=DetectLocal(mode="BridgeInterface", bridge_interface="x" * 16)), "1 to 15 octets"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(config: NodeConfiguration, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        node_rules(config)
