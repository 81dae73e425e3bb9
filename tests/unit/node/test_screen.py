"""What this node knows itself, it checks itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcproxy.model.addresses import format_target, parse_address
from vcproxy.model.endpoints import READY, Endpoint, pack, unpack
from vcproxy.model.services import PortKey, Protocol, ServicePort
from vcproxy.model.tenant import SUPER_UID
from vcproxy.node import screen as module
from vcproxy.node.screen import Denied, refused, screen

UID, OTHER = "dir-acme", "dir-globex"
DENIED = Denied(
    nodes=frozenset(map(parse_address, ("192.168.0.1", "fd00:1::1"))),
    pods={parse_address("10.0.0.1"): UID, parse_address("10.0.0.2"): OTHER, parse_address("fd00::2"): OTHER},
)


def port(*texts: str, name: str = "web") -> ServicePort:
    endpoints4, endpoints6, _ = pack(Endpoint(parse_address(text), 8080, READY) for text in texts)
    return ServicePort(PortKey("default", name, "", Protocol.TCP), endpoints4=endpoints4, endpoints6=endpoints6)


def targets(found: ServicePort) -> list[str]:
    return [
        format_target(one.address, one.port)
        for packed, family in ((found.endpoints4, 4), (found.endpoints6, 6))
        for one in unpack(packed, family)
    ]


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("10.0.0.1", ""),
        ("10.0.0.3", ""),  # on another node: the brain knows
        ("10.0.0.2", "is another tenant's pod"),
        ("fd00::2", "is another tenant's pod"),
        ("192.168.0.1", "is this node's own"),
        ("fd00:1::1", "is this node's own"),
        ("127.0.0.1", "is loopback, link-local, multicast or reserved"),
        ("169.254.169.254", "is loopback, link-local, multicast or reserved"),
        ("fe80::1", "is loopback, link-local, multicast or reserved"),
    ],
)
def test_who_may_lead_where(address: str, why: str) -> None:
    assert refused(UID, parse_address(address), DENIED) == why


def test_the_super_cluster_leads_where_it_likes_but_to_loopback() -> None:
    assert refused(SUPER_UID, parse_address("192.168.0.1"), DENIED) == ""
    assert refused(SUPER_UID, parse_address("10.0.0.2"), DENIED) == ""
    assert refused(SUPER_UID, parse_address("127.0.0.1"), DENIED)


def test_the_rest_of_a_port_goes_on() -> None:
    (left,), (said,) = screen(UID, [port("10.0.0.1", "10.0.0.2", "192.168.0.1", "fd00::2", "fd00::3")], DENIED)
    assert targets(left) == ["10.0.0.1:8080", "[fd00::3]:8080"]
    assert said.key == left.key
    assert said.reason == (
        "left out: endpoint 10.0.0.2 is another tenant's pod (and 1 more); endpoint 192.168.0.1 is this node's own"
    )


def test_what_may_stay_is_untouched() -> None:
    ports = (port("10.0.0.1", "fd00::3"), port())
    screened, rejections = screen(UID, ports, DENIED)
    assert all(one is other for one, other in zip(screened, ports, strict=True))
    assert rejections == ()


ADDRESSES = st.sampled_from(
    [
        "10.0.0.1",
        "10.0.0.2",
        "10.0.0.3",
        "0.0.10.1",
        "192.168.0.1",
        "127.0.0.1",
        "169.253.0.1",
        "169.254.0.1",
        "10.0.0.0",
        *("fd00::1", "fd00::2", "fd00:1::1", "fe80::1", "fe00::1", "::1", "fd00::"),
    ]
)


@given(st.lists(st.lists(ADDRESSES, max_size=6), max_size=8), st.sampled_from([UID, OTHER, SUPER_UID]))
def test_columns_tell_what_a_look_at_each_tells(texts, uid: str) -> None:
    ports = [port(*some, name=f"s{number}") for number, some in enumerate(texts)]
    one_by_one = [screen(uid, [found], DENIED) for found in ports]
    at, module.IN_COLUMNS = module.IN_COLUMNS, 0
    try:
        together = screen(uid, ports, DENIED)
    finally:
        module.IN_COLUMNS = at
    assert together.ports == tuple(one.ports[0] for one in one_by_one)
    assert together.rejections == tuple(said for one in one_by_one for said in one.rejections)
