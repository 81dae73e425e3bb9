"""Who may ask for which address."""

from __future__ import annotations

import pytest

from vcproxy.brain.guard import (
    KUBERNETES_PORTS,
    UNRESTRICTED,
    Policy,
    PortRange,
    Reason,
    Refusals,
    judge_external_ip,
    judge_port,
    judge_virtual_ip,
    judge_virtual_ranges,
)
from vcproxy.model.addresses import never_allowed, parse_address, parse_prefix

TENANT = Policy(
    virtual_ip_ranges=(parse_prefix("10.96.0.0/16"), parse_prefix("fd00:96::/112")),
    external_ip_ranges=(parse_prefix("203.0.113.0/28"),),
)


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0",
        "0.1.2.3",
        "127.0.0.1",
        "127.255.255.255",
        "169.254.169.254",
        "169.254.0.0",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::10.0.0.1",
        "fe80::1",
        "febf::1",
        "ff02::1",
        "::ffff:127.0.0.1",
    ],
)
def test_never_allowed_for_anybody(text: str) -> None:
    address = parse_address(text)
    assert never_allowed(address)
    assert judge_virtual_ip(address, UNRESTRICTED) is Reason.NEVER_ALLOWED
    assert judge_external_ip(address, UNRESTRICTED) is Reason.NEVER_ALLOWED


@pytest.mark.parametrize(
    "text", ["1.0.0.0", "10.0.0.1", "126.255.255.255", "128.0.0.1", "169.253.1.1", "169.255.1.1", "223.255.255.255"]
)
@pytest.mark.parametrize("prefix", ["", "::ffff:"])
def test_the_neighbours_of_those_are_allowed(text: str, prefix: str) -> None:
    assert not never_allowed(parse_address(prefix + text))


@pytest.mark.parametrize("text", ["fd00::1", "2001:db8::1", "fec0::1", "::1:0:0:1", "fe00::1", "64:ff9b::1"])
def test_ordinary_ipv6_is_allowed(text: str) -> None:
    assert not never_allowed(parse_address(text))


@pytest.mark.parametrize(
    ("text", "policy", "reason"),
    [
        ("10.96.0.1", TENANT, None),
        ("10.96.255.255", TENANT, None),
        ("10.97.0.0", TENANT, Reason.OUTSIDE_VIRTUAL_RANGES),
        ("fd00:96::ffff", TENANT, None),
        ("fd00:96::1:0", TENANT, Reason.OUTSIDE_VIRTUAL_RANGES),
        ("8.8.8.8", Policy(), None),
        ("8.8.8.8", UNRESTRICTED, None),
    ],
)
def test_virtual_ips(text: str, policy: Policy, reason: Reason | None) -> None:
    assert judge_virtual_ip(parse_address(text), policy) is reason


@pytest.mark.parametrize(
    ("text", "policy", "reason"),
    [
        ("203.0.113.15", TENANT, None),
        ("203.0.113.16", TENANT, Reason.EXTERNAL_IP),
        ("2001:db8::1", TENANT, Reason.EXTERNAL_IP),
        ("203.0.113.15", Policy(), Reason.EXTERNAL_IP),
        ("203.0.113.15", UNRESTRICTED, None),
    ],
)
def test_external_ips_are_granted_not_taken(text: str, policy: Policy, reason: Reason | None) -> None:
    assert judge_external_ip(parse_address(text), policy) is reason


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["10.96.0.0/16"], ["10.96.0.0/16"]),
        (["10.96.4.0/24", "fd00:96::/120"], ["10.96.4.0/24", "fd00:96::/120"]),
        (["0.0.0.0/0"], ["10.96.0.0/16"]),
        (["169.254.0.0/16", "10.0.0.0/16"], []),
    ],
)
def test_a_tenants_service_cidrs_count_within_the_operators_ranges(asked: list[str], expected: list[str]) -> None:
    assert [str(found) for found in judge_virtual_ranges(map(parse_prefix, asked), TENANT)] == expected


def test_service_cidrs_without_operators_ranges_are_the_tenants_own() -> None:
    found = judge_virtual_ranges(map(parse_prefix, ["10.96.0.0/16", "10.0.0.0/24", "10.96.0.0/16"]), Policy())
    assert [str(prefix) for prefix in found] == ["10.0.0.0/24", "10.96.0.0/16"]


def test_refusals_are_one_record_a_field_and_reason_and_printable() -> None:
    refusals = Refusals("Service", "ns", "web")
    for number in range(1000):
        refusals.add("spec.externalIPs", Reason.EXTERNAL_IP, f"evil\x1b[2J{number}" + "x" * 500)
    (record,) = refusals.records()
    assert record.count == 1000
    assert len(record.value) <= 64
    assert record.value.isprintable()
    assert "and 999 more" in str(record)
    assert record.cure in str(record)


@pytest.mark.parametrize(
    ("port", "policy", "reason"),
    [
        (30000, Policy(), Reason.NODE_PORT),
        (30000, Policy(node_ports=KUBERNETES_PORTS), None),
        (32767, Policy(node_ports=KUBERNETES_PORTS), None),
        (29999, Policy(node_ports=KUBERNETES_PORTS), Reason.NODE_PORT_RANGE),
        (32768, Policy(node_ports=KUBERNETES_PORTS), Reason.NODE_PORT_RANGE),
        (10250, Policy(node_ports=KUBERNETES_PORTS), Reason.NODE_PORT_RANGE),  # a kubelet's
        (31000, Policy(node_ports=(PortRange(22, 22), PortRange(40000, 40099))), Reason.NODE_PORT_RANGE),
        (22, UNRESTRICTED, None),  # the super cluster's API server is the operator's
        (65535, UNRESTRICTED, None),
    ],
)
def test_ports_of_the_shared_nodes(port: int, policy: Policy, reason: Reason | None) -> None:
    assert judge_port(port, policy.node_ports) is reason
