"""The node's own elements: attachments, node ports' addresses, who is masqueraded."""

import pytest

from vcproxy.backend.protocol import Attachments, NodeState
from vcproxy.model.addresses import Prefix, parse_address, parse_prefix
from vcproxy_nftables.node import attachment_elements, node_elements
from vcproxy_nftables.specs import (
    FAMILY,
    LOCAL_INTERFACES,
    MASQUERADE_ALL,
    MASQUERADE_NONLOCAL,
    ZONE_BY_INTERFACE,
    merge_prefixes,
)


def test_attachments_say_which_zone_a_device_and_an_address_are_of() -> None:
    found = attachment_elements(
        Attachments(
            interfaces={"vx-acme": "acme"},
            addresses={parse_address("10.0.0.1"): "bolt", parse_address("fd00::1"): "bolt"},
        ),
        {"acme": 20000, "bolt": 20001},
    )
    assert found[ZONE_BY_INTERFACE] == {b"vx-acme".ljust(16, b"\0"): (20000).to_bytes(2, "little")}
    assert found[FAMILY[4].zone_by_address] == {parse_address("10.0.0.1"): (20001).to_bytes(2, "little")}
    assert found[FAMILY[6].zone_by_address] == {parse_address("fd00::1"): (20001).to_bytes(2, "little")}


@pytest.mark.parametrize(
    ("state", "everything", "nonlocal_sources"),
    [
        (NodeState(), False, False),
        (NodeState(local_sources=()), False, True),
        (NodeState(local_sources=(parse_prefix("10.0.0.0/8"),)), False, True),
        (NodeState(local_interfaces=("veth*",)), False, True),
        (NodeState(masquerade_all=True), True, False),
    ],
    ids=["no detector", "no source is local", "a detector", "a detector of devices", "masquerade all"],
)
def test_masquerade_switches(state: NodeState, everything: bool, nonlocal_sources: bool) -> None:
    found = node_elements(state)
    assert bool(found[MASQUERADE_ALL]) == everything
    assert bool(found[MASQUERADE_NONLOCAL]) == nonlocal_sources


@pytest.mark.parametrize(
    ("pattern", "first", "last"),
    [
        ("cni0", b"cni0" + bytes(12), b"cni0" + bytes(12)),
        ("veth*", b"veth" + bytes(12), b"veth" + b"\xff" * 12),
        ("a" * 15 + "*", b"a" * 15 + b"\0", b"a" * 15 + b"\xff"),
    ],
)
def test_a_local_device_is_a_range_of_names(pattern: str, first: bytes, last: bytes) -> None:
    zone = bytes(4)
    nameless = bytes(20) * 2
    found = node_elements(NodeState(local_interfaces=(pattern,)))[LOCAL_INTERFACES]
    assert set(found) == {zone + first + zone + last, nameless}


@pytest.mark.parametrize(
    ("prefixes", "kept"),
    [
        (["10.0.0.0/8", "10.1.0.0/16", "10.0.0.0/8"], ["10.0.0.0/8"]),
        (["10.1.0.0/16", "10.2.0.0/16"], ["10.1.0.0/16", "10.2.0.0/16"]),
        (["0.0.0.0/0", "::/0", "fd00::/8"], ["0.0.0.0/0", "::/0"]),
    ],
)
def test_ranges_that_another_covers_are_left_out(prefixes: list[str], kept: list[str]) -> None:
    found: list[Prefix] = merge_prefixes(tuple(map(parse_prefix, prefixes)))
    assert [str(prefix) for prefix in found] == kept
