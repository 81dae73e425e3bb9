"""What the lab's commands say, and what it refuses to be asked; no namespace is made here (tests/packets/test_lab.py
does).
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch

import pytest

from vcproxy.lab import Lab, LabError, LabUnavailable, require_root, wiring
from vcproxy.lab.iproute import failure

IFNAMSIZ = 16  # with the terminating zero

ACME = wiring.Overlay(tenant="acme", vni=100, table=1001)
LONGEST = wiring.Overlay(tenant="globex78", vni=200, table=1002)
NODE = wiring.Vtep(number=1, ip4="192.168.77.11", ip6="fd77::11")


@pytest.mark.parametrize("overlay", [ACME, LONGEST])
def test_device_names_fit_the_kernel(overlay: wiring.Overlay) -> None:
    for device in (overlay.vxlan, overlay.pod_device(1), overlay.pod_device(999)):
        assert len(device) < IFNAMSIZ


def test_interface_globs_match_the_tenants_devices_and_no_others() -> None:
    neighbours = [wiring.Overlay(tenant=name, vni=1, table=1) for name in ("acme2", "acm", "cme", "x")]
    assert all(any(fnmatch(device, glob) for glob in ACME.interfaces) for device in (ACME.vxlan, ACME.pod_device(12)))
    for other in neighbours:
        for device in (other.vxlan, other.pod_device(1), "eth0", "veth0001"):
            assert not any(fnmatch(device, glob) for glob in ACME.interfaces), device


def test_pods_of_an_overlay_are_routed_in_the_tenants_table_only() -> None:
    lines = wiring.pod_port(device="vp-acme-1", ip4="10.244.0.1", ip6="fd00:244::1", table=ACME.table)
    routes = [line for line in [*lines, *ACME.peer(NODE), *ACME.join(NODE)] if line.startswith("route")]
    assert len(routes) == 6
    assert all(line.endswith(" table 1001") for line in routes)


def test_flat_pods_are_routed_in_the_main_table() -> None:
    lines = wiring.pod_port(device="veth0001", ip4="10.200.1.1", ip6="fd00:200:0:1::1")
    assert not any("table" in line for line in lines)


def test_what_enters_or_leaves_by_a_device_is_looked_up_in_the_tenants_table() -> None:
    assert ACME.device_rules("vx-acme") == [
        "rule add pref 1000 iif vx-acme lookup 1001",
        "rule add pref 1000 oif vx-acme lookup 1001",
    ]


@pytest.mark.parametrize("family", [4, 6])
def test_marked_udp_is_not_led_to_the_tenant(family: int) -> None:
    """VXLAN's outer packets inherit the mark; led to the tenant's table, they would enter the tunnel again."""
    assert not any("udp" in rule or "ipproto" not in rule for rule in ACME.reply_rules(family=family))


@pytest.mark.parametrize(
    "number, mac, gateway", [(1, "02:00:00:01:00:01", "fe80::1:1"), (258, "02:00:00:01:01:02", "fe80::1:102")]
)
def test_nodes_have_hardware_addresses_of_their_own(number: int, mac: str, gateway: str) -> None:
    vtep = wiring.Vtep(number=number, ip4="192.168.77.11", ip6="fd77::11")
    assert (vtep.mac, vtep.gateway6) == (mac, gateway)


def test_failed_line_of_a_batch_is_named_with_the_kernels_words() -> None:
    error = failure(
        "ip", ["link set lo up", "route add x"], ns="vcp.1.0.a", stderr="Error: bad x.\nCommand failed -:2\n"
    )
    assert str(error) == "`ip route add x` in namespace vcp.1.0.a failed: Error: bad x."
    assert not isinstance(error, LabUnavailable)


@pytest.mark.parametrize(
    "stderr, cure",
    [
        ("Error: Unknown device type.\nCommand failed -:1\n", "load its module"),
        ("RTNETLINK answers: Operation not permitted\nCommand failed -:1\n", "--privileged"),
        ("mount --make-shared /run/netns failed: Operation not permitted\n", "--privileged"),
    ],
)
def test_failure_that_is_the_machines_comes_with_its_cure(stderr: str, cure: str) -> None:
    error = failure("ip", ["link add vx type vxlan"], ns=None, stderr=stderr)
    assert isinstance(error, LabUnavailable)
    assert cure in str(error)
    assert str(error).startswith("`ip link add vx type vxlan` failed: ")


@pytest.mark.parametrize("prefix", ["", "a.b", "A", "-a", "a" * 33, "a/b"])
def test_prefix_that_could_meet_another_is_refused(prefix: str) -> None:
    for ask in (Lab, Lab.sweep):
        with pytest.raises(LabError, match="lab prefix"):
            ask(prefix)


@pytest.mark.parametrize("name", ["", "globex789", "1st", "a-b", "Acme"])
def test_overlay_tenant_whose_devices_could_not_be_named_is_refused(name: str) -> None:
    with pytest.raises(LabError, match="want 1 to 8 small letters and digits"):
        Lab("vcp-unit").overlay_tenant(name, vni=1)


def test_two_overlay_tenants_share_neither_name_nor_vni_nor_table() -> None:
    lab = Lab("vcp-unit")
    acme, globex = lab.overlay_tenant("acme", vni=1), lab.overlay_tenant("globex", vni=2)
    assert acme.overlay.table != globex.overlay.table
    retries: list[Callable[[], object]] = [lambda: lab.overlay_tenant("acme", 3), lambda: lab.overlay_tenant("x", 2)]
    for retry in retries:
        with pytest.raises(LabError, match="is taken"):
            retry()


def test_without_root_the_lab_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(LabUnavailable, match="sudo"):
        require_root()
