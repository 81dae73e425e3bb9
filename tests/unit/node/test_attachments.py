"""Configuration, links and placement to attachments: whose packet is whose, and what happens in doubt."""

from collections.abc import Mapping

import pytest

from vcproxy.model.addresses import parse_address
from vcproxy.node.attachments import QUARANTINE, Names, attach
from vcproxy.node.config import AddressAttachment, Attachment, InterfaceAttachment

ACME, BETA = Names("uid-a", "acme"), Names("uid-b", "beta")


def overlay(tenant: str, *names: str) -> Attachment:
    return Attachment(interface=InterfaceAttachment(tenant=tenant, names=names))


@pytest.mark.parametrize(
    ("config", "links", "interfaces"),
    [
        (
            [overlay("acme", "br-acme", "vx-acme")],
            {"br-acme", "vx-acme", "eth0"},
            {"br-acme": "uid-a", "vx-acme": "uid-a"},
        ),
        (
            [overlay("acme", "vx-acme*")],
            {"vx-acme0", "vx-acme1", "vx-beta"},
            {"vx-acme0": "uid-a", "vx-acme1": "uid-a"},
        ),
        ([overlay("acme", "vx?")], {"vx1", "vx10"}, {"vx1": "uid-a"}),
        ([overlay("acme", "vx[12]")], {"vx1", "vx3"}, {"vx1": "uid-a"}),
        ([overlay("*", "br-{tenant}")], {"br-acme", "br-beta", "br-other"}, {"br-acme": "uid-a", "br-beta": "uid-b"}),
        ([overlay("*", "{uid}")], {"uid-a"}, {"uid-a": "uid-a"}),
        ([overlay("acme", "br-{tenant}")], {"br-acme", "br-beta"}, {"br-acme": "uid-a"}),
        ([overlay("acme", "*")], {"lo", "eth1"}, {"eth1": "uid-a"}),
        ([overlay("acme", "br-acme")], set(), {}),
        ([], {"br-acme"}, {}),
    ],
)
def test_interfaces(config: list[Attachment], links: set[str], interfaces: Mapping[str, str]) -> None:
    attached = attach(links=links, placement={}, config=config, tenants=[ACME, BETA])
    assert attached.attachments.interfaces == interfaces
    assert attached.problems == ()


def test_an_interface_that_two_tenants_claim_goes_to_neither() -> None:
    config = [overlay("acme", "vx*"), overlay("beta", "vx0")]
    attached = attach(links={"vx0", "vx1"}, placement={}, config=config, tenants=[ACME, BETA])
    assert attached.attachments.interfaces == {"vx0": QUARANTINE, "vx1": "uid-a"}
    (problem,) = attached.problems
    assert "vx0 is claimed by several tenants: acme (uid-a), beta (uid-b)" in problem


def test_two_tenants_of_one_name_do_not_share_a_device() -> None:
    attached = attach(
        links={"br-acme"}, placement={}, config=[overlay("acme", "br-acme")], tenants=[ACME, Names("uid-z", "acme")]
    )
    assert attached.attachments.interfaces == {"br-acme": QUARANTINE}


def test_a_device_of_a_tenant_that_is_not_known_does_not_fall_to_the_super_cluster() -> None:
    attached = attach(links={"br-new"}, placement={}, config=[overlay("new", "br-{tenant}", "{uid}")], tenants=[ACME])
    assert attached.attachments.interfaces == {"br-new": QUARANTINE}
    assert "not known here" in attached.problems[0]


def test_a_tenant_name_is_never_a_glob() -> None:
    attached = attach(
        links={"br-acme", "br-*"},
        placement={},
        config=[overlay("*", "br-{tenant}")],
        tenants=[Names("uid-x", "*"), ACME],
    )
    assert attached.attachments.interfaces == {"br-*": "uid-x", "br-acme": "uid-a"}


def test_the_super_cluster_needs_no_attachment() -> None:
    config = [overlay("super", "cni0"), Attachment(address=AddressAttachment())]
    placement = {parse_address("10.0.0.1"): "super", parse_address("10.0.0.2"): "uid-a"}
    attached = attach(links={"cni0"}, placement=placement, config=config, tenants=[Names("super", "super"), ACME])
    assert attached.attachments.interfaces == {}
    assert attached.attachments.addresses == {parse_address("10.0.0.2"): "uid-a"}


def test_placement_counts_only_where_it_is_configured() -> None:
    placement = {parse_address("10.0.0.2"): "uid-a"}
    assert attach(links=(), placement=placement, config=[], tenants=[ACME]).attachments.addresses == {}


def test_the_node_itself_is_never_a_tenants() -> None:
    node = parse_address("192.168.0.2")
    attached = attach(
        links=(),
        placement={node: "uid-a", parse_address("fd00::2"): "uid-a"},
        config=[Attachment(address=AddressAttachment())],
        tenants=[ACME],
        node_addresses=[node],
    )
    assert attached.attachments.addresses == {parse_address("fd00::2"): "uid-a"}
