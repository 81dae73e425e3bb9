"""Preflight: what is found on good and bad machines, and the cure."""

import pytest

from vcproxy.node.preflight import Check, Machine, State, preflight

FILES = {
    "/proc/self/status": "Name:\tx\nCapEff:\t000001ffffffffff\n",
    "/proc/sys/net/ipv4/ip_forward": "1\n",
    "/proc/sys/net/ipv6/conf/all/forwarding": "1\n",
    "/proc/sys/net/netfilter/nf_conntrack_max": "262144\n",
    "/proc/sys/net/netfilter/nf_conntrack_count": "12\n",
}
CHAINS = ("nft", "list", "chains")
OUTPUTS = {
    ("nft", "--version"): "nftables v1.0.6 (Lester Gooch #5)\n",
    CHAINS: "table inet other {\n\tchain KUBE-SERVICES {\n\t}\n}\ntable inet kube-proxy {\n}\n",
}


def findings(
    files: dict[str, str] | None = None,
    outputs: dict[tuple[str, ...], str] | None = None,
    release: str = "6.1.0-18-amd64",
) -> list[Check]:
    all_files, all_outputs = FILES | (files or {}), OUTPUTS | (outputs or {})
    return preflight(Machine(read=all_files.get, run=all_outputs.get, release=release))


def test_a_good_node() -> None:
    assert {check.state for check in findings()} == {State.OK}
    assert all(not check.cure for check in findings())


@pytest.mark.parametrize(
    ("files", "outputs", "release", "name", "state", "cure"),
    [
        ({"/proc/self/status": "CapEff:\t0000000000000000\n"}, {}, "6.1", "privileges", State.ERROR, "run as root"),
        ({}, {}, "5.10.0-28-amd64", "kernel", State.ERROR, "boot a kernel >= 5.13"),
        ({}, {("nft", "--version"): "nftables v0.9.8 (E.D.S.)"}, "6.1", "nft", State.ERROR, "install nftables >= 1.0.1"),
        ({"/proc/sys/net/ipv4/ip_forward": "0\n"}, {}, "6.1", "net.ipv4.ip_forward", State.ERROR, "sysctl -w"),
        ({"/proc/sys/net/bridge/bridge-nf-call-iptables": "0\n"}, {}, "6.1", "net.bridge.bridge-nf-call-iptables", State.WARNING, "sysctl -w"),
        ({"/proc/sys/net/ipv4/conf/all/rp_filter": "1\n"}, {}, "6.1", "net.ipv4.conf.all.rp_filter", State.WARNING, "=2"),
        ({"/proc/sys/net/netfilter/nf_conntrack_count": "262000\n"}, {}, "6.1", "conntrack", State.WARNING, "raise"),
        ({}, {CHAINS: "table ip kube-proxy {\n\tchain services {\n\t}\n}\n"}, "6.1", "kube-proxy", State.WARNING, "--cleanup"),
        ({}, {CHAINS: "table ip6 nat {\n\tchain KUBE-SERVICES {\n\t}\n}\n"}, "6.1", "kube-proxy", State.WARNING, "--cleanup"),
    ],
)  # fmt: skip
def test_a_bad_node(
    files: dict[str, str], outputs: dict[tuple[str, ...], str], release: str, name: str, state: State, cure: str
) -> None:
    bad = [check for check in findings(files, outputs, release) if check.state is not State.OK]
    assert [(check.name, check.state) for check in bad] == [(name, state)]
    assert cure in bad[0].cure


def test_nft_missing_is_an_error_with_its_cure() -> None:
    all_files = FILES
    bad = [
        c for c in preflight(Machine(read=all_files.get, run=lambda _: None, release="6.1")) if c.state is State.ERROR
    ]
    assert [(c.name, c.cure) for c in bad] == [("nft", "install the package nftables")]
