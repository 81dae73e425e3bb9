"""The table's life: restarts, other people's hands, refusals by the kernel, removal."""

from __future__ import annotations

import json
import re
import select
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.packets.programmed import (
    Programmed,
    answered_by,
    cluster_ip,
    eventually,
    flows,
    frontend,
    key,
    programmed,
    service,
)
from vcproxy.backend.protocol import BackendError, BackendUnavailable, Drift
from vcproxy.lab import Lab, Node, Pod, Reply, TcpSession, netns, tcp_request
from vcproxy.model.addresses import parse_address, parse_prefix
from vcproxy.model.services import FrontendKind, Protocol
from vcproxy_nftables import NftablesBackend, table
from vcproxy_nftables.batch import Batch
from vcproxy_nftables.kernel import _SHAPES
from vcproxy_nftables.netlink import Nfnetlink
from vcproxy_nftables.specs import FAMILY, PORT
from vcproxy_nftables.wire import NetlinkError, OutcomeUnknown

pytestmark = pytest.mark.packets

VIP = {4: "10.97.0.10", 6: "fd00:97::10"}
BOLT = ("10.200.9.9", "fd00:200:0:9::9")
RANGES = (parse_prefix("10.97.0.0/16"), parse_prefix("fd00:97::/64"))


@dataclass(frozen=True)
class World:
    node: Node
    client: Pod
    near: Pod
    far: Pod

    def nft(self, text: str) -> None:
        self.node.run(["nft", "-f", "-"], stdin=text)

    def generation(self) -> int:
        with netns.entered(self.node.ns):
            netlink = Nfnetlink()
            try:
                return netlink.generation()
            finally:
                netlink.close()

    def services(self) -> list[Any]:
        """One of everything."""
        public = [
            *cluster_ip(*VIP.values()),
            *(frontend(FrontendKind.NODE_PORT, family, 30080) for family in (4, 6)),
            *(frontend(FrontendKind.LOAD_BALANCER, address, 80) for address in ("198.51.100.1", "2001:db8::1")),
        ]
        both = [self.near, self.far]
        return [
            service(public, both, own=[self.near, self.far], affinity_seconds=100, source_ranges=RANGES),
            service(cluster_ip(*VIP.values(), port=53), both, name="dns", protocol=Protocol.UDP, port=53),
            service(cluster_ip("10.97.0.11", "fd00:97::11"), both, name="sctp", protocol=Protocol.SCTP),
            service(cluster_ip("10.97.0.12", "fd00:97::12"), _many(40), name="large"),
        ]

    def fill(self, backend: Programmed) -> list[Any]:
        applied = [
            backend.put(uid, *self.services()[: None if uid == "super" else 2], ranges=RANGES, complete=True)
            for uid in ("super", "acme")
        ]
        backend.attach(interfaces={"nowhere0": "bolt"}, addresses=dict.fromkeys(map(parse_address, BOLT), "bolt"))
        return applied

    def reaches(self) -> bool:
        return all(isinstance(tcp_request(self.client, VIP[family], 80, timeout=0.3), Reply) for family in (4, 6))


def _many(count: int) -> list[Pod]:
    return [
        Pod(name=f"p{n}", ns="", ip4=f"10.9.0.{n}", ip6=f"fd09::{n:x}", node="", device="", tenant=None)
        for n in range(1, count + 1)
    ]


@pytest.fixture(scope="module")
def lab() -> Iterator[World]:
    with Lab("vcp-nft-life") as lab:
        one, two = lab.node("one"), lab.node("two")
        world = World(
            one,
            one.flat_pod("client", "10.200.1.2", "fd00:200:0:1::2"),
            one.flat_pod("near", "10.200.1.3", "fd00:200:0:1::3"),
            two.flat_pod("far", "10.200.2.2", "fd00:200:0:2::2"),
        )
        for pod in (world.near, world.far):
            lab.serve(pod, tcp=[80], udp=[53])
        yield world


@pytest.fixture
def world(lab: World) -> Iterator[World]:
    yield lab
    Programmed(lab.node).cleanup()


def drifted(backend: Programmed, seconds: float = 2.0) -> bool:
    """Wait until the backend's descriptor says something, as the agent's loop does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if select.select([backend.backend.fileno()], [], [], 0.05)[0] and backend.backend.drifted():
            return True
    return False


def test_the_populated_table_lists_as_text_and_json_and_loads_back(world: World) -> None:
    with programmed(world.node) as (backend,):
        world.fill(backend)
        assert world.reaches()  # affinity has clients to list
        text = world.node.run(["nft", "list", "table", "inet", "vcproxy"]).stdout
        listed = world.node.run(["nft", "-j", "list", "table", "inet", "vcproxy"]).stdout
        assert any("map" in entry for entry in json.loads(listed)["nftables"])
        world.nft("delete table inet vcproxy\n" + text)
        again = world.node.run(["nft", "list", "table", "inet", "vcproxy"]).stdout
        assert _steady(_words(again)) == _steady(_words(text))
        assert world.reaches()


def test_the_kernels_maps_have_the_shapes_that_we_write(world: World) -> None:
    with programmed(world.node), netns.entered(world.node.ns):
        netlink = Nfnetlink()
        facts = {name: (found.key_octets, found.data_octets) for name, found in netlink.sets().items()}
        netlink.close()
    assert facts == _SHAPES


def test_a_restart_adopts_the_table_and_writes_nothing(world: World) -> None:
    with programmed(world.node) as (backend,):
        world.fill(backend)
        with TcpSession(world.client, VIP[4], 80) as held:
            before = world.generation()
            attached = backend.backend.attachments()
            again = backend.reopened()
            assert again.backend.tenants() == {"super", "acme", "bolt"}
            assert again.backend.attachments() == attached
            assert attached.interfaces == {"nowhere0": "bolt"}
            assert attached.addresses == dict.fromkeys(map(parse_address, BOLT), "bolt")
            assert not again.backend.drifted()
            assert world.reaches()  # nobody has told it anything yet
            assert [applied.operations for applied in world.fill(again)] == [0, 0]
            assert again.repair().foreign == 0
            assert world.generation() == before
            assert held.ask("still?").endswith("still?")
        again.backend.close()


def test_a_restart_writes_what_has_changed_meanwhile(world: World) -> None:
    with programmed(world.node) as (backend,):
        backend.put("super", service(cluster_ip(*VIP.values()), [world.near, world.far]), complete=True)
        again = backend.reopened()
        applied = again.put("super", service(cluster_ip(*VIP.values()), [world.far]), complete=True)
        # In each family: a target leaves, the other takes its slot, and the pool's size in the frontend's value.
        assert applied.operations == 2 * (3 + 2)
        assert answered_by(lambda: tcp_request(world.client, VIP[4], 80), 5) == {"far"}
        again.backend.close()


def test_a_tenant_nobody_speaks_of_after_a_restart_stays_until_it_is_removed(world: World) -> None:
    with programmed(world.node) as (backend,):
        world.fill(backend)
        again = backend.reopened()
        assert world.reaches()
        with pytest.raises(BackendError, match="complete update"):
            again.put("acme", world.services()[0])
        again.remove_tenant("acme")
        assert {row["tenant"] for row in again.dump()} == {"super"}
        assert world.reaches()
        again.backend.close()


def test_a_table_that_somebody_deleted_is_back_within_a_second(world: World) -> None:
    with programmed(world.node) as (backend,):
        world.fill(backend)
        before = world.node.run(["nft", "list", "table", "inet", "vcproxy"]).stdout
        world.nft("delete table inet vcproxy\n")
        started = time.monotonic()
        assert drifted(backend)
        assert backend.repair().rebuilt
        assert time.monotonic() - started < 1.0
        assert world.reaches()
        after = world.node.run(["nft", "list", "table", "inet", "vcproxy"]).stdout
        assert _steady(_words(after)) == _steady(_words(before))
        assert not backend.backend.drifted()


def _words(text: str) -> list[str]:
    """What a listing says, sorted: hash maps list in any order."""
    return sorted(word for word in re.split(r"elements = {|[,\n}]", text) if word.strip())


def test_an_update_finds_the_table_deleted(world: World) -> None:
    with programmed(world.node) as (backend,):
        world.fill(backend)
        world.nft("delete table inet vcproxy\n")
        backend.put("super", service(cluster_ip("10.97.0.20"), [world.far], name="late"))
        assert world.reaches()
        assert answered_by(lambda: tcp_request(world.client, "10.97.0.20", 80), 3) == {"far"}


MEDDLING = {
    "an element removed": "delete element inet vcproxy tcp4_frontends { 0 . 10.97.0.10 . 80 }",
    "all elements removed": "flush map inet vcproxy endpoints4",
    "an element added": "add element inet vcproxy virtual_ips4 { 0 . 10.99.0.1 }",
    "a frontend of nobody": "add element inet vcproxy tcp4_frontends { 7 . 10.99.0.1 . 80 : 10:5 }",
    "a target of nobody": "add element inet vcproxy endpoints4 { f:fff0 . 7 : 10.0.0.1 . 80 }",
    "a rule removed": "flush chain inet vcproxy postrouting",
    "a rule added": "insert rule inet vcproxy services drop",
    "a chain added": "add chain inet vcproxy stranger",
    "a set added": "add set inet vcproxy stranger { type ipv4_addr; }",
    "a size's way removed": "flush map inet vcproxy balance4",
    "an affinity timeout's rules removed": "flush chain inet vcproxy learn4_100",
    "the zones' chains removed": "".join(
        f"flush chain inet vcproxy {name}\ndelete chain inet vcproxy {name}\n" for name in table.ZONING_CHAINS
    ),
    "one of the zones' chains removed": f"delete chain inet vcproxy {table.ZONING_CHAINS[1]}",
}


@pytest.mark.parametrize("what", MEDDLING)
def test_repair_undoes_what_somebody_did_to_the_table(world: World, what: str) -> None:
    with programmed(world.node) as (backend,):
        world.fill(backend)
        before = _words(world.node.run(["nft", "list", "table", "inet", "vcproxy"]).stdout)
        with TcpSession(world.client, VIP[4], 80) as held:
            before = _words(world.node.run(["nft", "list", "table", "inet", "vcproxy"]).stdout)
            world.nft(MEDDLING[what])
            assert drifted(backend)
            drift = backend.repair()
            assert drift.rebuilt or drift.missing or drift.foreign
            after = _words(world.node.run(["nft", "list", "table", "inet", "vcproxy"]).stdout)
            assert _steady(after) == _steady(before)
            assert held.ask("still?").endswith("still?")
        assert backend.repair() == Drift()
        assert world.reaches()


def _steady(words: list[str]) -> list[str]:
    """Without learnt clients, whose timeouts run."""
    return [" ".join(word.split()) for word in words if "expires" not in word]


def test_packets_are_looked_at_for_zones_once_there_are_any(world: World) -> None:
    def zoning() -> set[str]:
        listed = world.node.run(["nft", "list", "chains", "inet"]).stdout
        return {name for name in table.ZONING_CHAINS if f"chain {name} " in listed}

    with programmed(world.node) as (backend,):
        backend.put("super", *world.services(), complete=True)
        backend.put("acme", complete=True)
        assert zoning() == set()
        backend.attach(interfaces={"nowhere0": "acme"})
        assert zoning() == set(table.ZONING_CHAINS)
        assert not backend.backend.drifted()
        backend.attach()
        backend.attach(addresses={parse_address(BOLT[0]): "bolt"})
        assert backend.repair() == Drift()
        world.nft("".join(f"flush chain inet vcproxy {name}\n" for name in table.ZONING_CHAINS))
        again = backend.reopened()
        assert zoning() == set(table.ZONING_CHAINS)
        assert again.repair() == Drift()
        again.backend.close()


def test_other_peoples_tables_are_no_matter(world: World) -> None:
    with programmed(world.node) as (backend,):
        world.nft("add table inet other\nadd chain inet other c\n")
        assert not drifted(backend, seconds=0.3)
        world.nft("delete table inet other\n")


def test_our_own_changes_are_no_drift(world: World) -> None:
    with programmed(world.node) as (backend,):
        world.fill(backend)  # makes chains on demand too
        assert not backend.backend.drifted()


def test_a_table_of_another_layout_is_mended_in_place(world: World) -> None:
    with programmed(world.node) as (backend,):
        world.fill(backend)
        backend.backend.close()
        world.nft(
            f"delete chain inet vcproxy {table.layout_chain()}\n"
            "table inet vcproxy { chain layout_0123456789abcdef { }\n set old_idea { type ipv4_addr; }\n }\n"
            "insert rule inet vcproxy tcp4 counter\n"
        )
        with TcpSession(world.client, VIP[4], 80) as held:
            again = Programmed(world.node)
            assert world.reaches()
            chains = world.node.run(["nft", "list", "chains", "inet"]).stdout
            assert table.layout_chain() in chains
            assert "layout_0123456789abcdef" not in chains
            assert held.ask("still?").endswith("still?")
        assert [applied.operations for applied in world.fill(again)] == [0, 0]
        again.backend.close()


def test_a_table_that_only_has_our_name_is_replaced(world: World) -> None:
    world.nft("table inet vcproxy { map endpoints4 { type ipv4_addr : ipv4_addr; }\n }\n")
    with programmed(world.node) as (backend,):
        world.fill(backend)
        assert world.reaches()


def test_a_port_that_the_kernel_refuses_is_rejected_alone_and_keeps_its_last_good_form(world: World) -> None:
    with programmed(world.node) as (backend,):
        good = service(cluster_ip(VIP[4]), [world.near], name="good")
        backend.put("super", good)
        kernel = backend.backend._kernel
        send, poison = kernel.send, PORT[Protocol.TCP, 4].frontends
        bad = bytes(4) + bytes((10, 97, 0, 66)) + (80).to_bytes(2, "big") + bytes(2)

        def refusing(batches: Iterable[Batch]) -> int:
            """A kernel that will not have one element; of what we write, the true one refuses nothing."""
            found = list(batches)
            if any(bad in batch.message() for batch in found):
                raise NetlinkError("no", errno=22, name=poison.name, key=bad)
            return send(found)

        kernel.send = refusing  # type: ignore[method-assign]
        applied = backend.put(
            "super",
            service(cluster_ip(VIP[4]), [world.far], name="good"),
            service(cluster_ip("10.97.0.66"), [world.far], name="bad"),
            service(cluster_ip("10.97.0.67"), [world.far], name="better"),
        )
        assert [rejection.key for rejection in applied.rejections] == [key("bad")]
        assert answered_by(lambda: tcp_request(world.client, "10.97.0.67", 80), 3) == {"far"}
        assert answered_by(lambda: tcp_request(world.client, VIP[4], 80), 3) == {"far"}
        assert backend.repair() == Drift()


@pytest.mark.parametrize("done", [True, False], ids=["done", "not done"])
def test_an_answer_that_is_lost_ends_in_the_right_table(world: World, done: bool) -> None:
    with programmed(world.node) as (backend,):
        backend.put("super", service(cluster_ip(*VIP.values()), [world.near]))
        netlink = backend.backend._kernel.netlink
        commit = netlink.commit

        def losing(batch: Any) -> None:
            netlink.commit = commit  # type: ignore[method-assign]
            if done:
                commit(batch)
            raise OutcomeUnknown("lost", errno=105)

        netlink.commit = losing  # type: ignore[assignment, method-assign]
        backend.put("super", service(cluster_ip(*VIP.values()), [world.far]))
        assert answered_by(lambda: tcp_request(world.client, VIP[4], 80), 3) == {"far"}
        assert backend.repair() == Drift()


def test_cleanup_leaves_nothing_also_when_never_opened(world: World) -> None:
    backend = Programmed(world.node)
    world.fill(backend)
    backend.backend.close()
    with netns.entered(world.node.ns):
        NftablesBackend({}).cleanup()
        NftablesBackend({}).cleanup()
    assert "vcproxy" not in world.node.run(["nft", "list", "tables"]).stdout
    eventually(lambda: not world.reaches())


def test_a_zone_is_given_out_again_without_a_flow_in_it(world: World) -> None:
    with programmed(world.node) as (backend,):
        backend.backend.close()
        only = Programmed(world.node, {"zones": [777, 777]})
        only.put("acme", service(cluster_ip(VIP[4]), [world.far]))
        only.attach(addresses={_address(world.client): "acme"})
        with pytest.raises(BackendError, match="widen the option"):
            only.put("bolt", service(cluster_ip(VIP[4]), [world.near]))
        with TcpSession(world.client, VIP[4], 80):
            assert _tcp_flows(world, 777)
            only.attach()
            only.remove_tenant("acme")
            assert not _tcp_flows(world, 777)
        only.put("bolt", service(cluster_ip(VIP[4]), [world.near]))
        assert {row["tenant"] for row in only.dump()} == {"bolt"}
        only.backend.close()


def _address(pod: Pod) -> bytes:
    return parse_address(pod.ip4)


def _tcp_flows(world: World, zone: int) -> list[str]:
    return [line for line in flows(world.node, zone) if line.startswith("tcp ")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zone": 1}, "no option zone"),
        ({"zones": [0, 5]}, "zones"),
        ({"zones": [5, 4]}, "zones"),
        ({"zones": "all"}, "zones"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NftablesBackend(options)


def test_a_dump_shows_what_the_kernel_does(world: World) -> None:
    with programmed(world.node) as (backend,):
        world.fill(backend)
        rows = {(row["kind"], row["protocol"], row["address"], row["port"]): row for row in backend.dump("super")}
        row = rows["public", "TCP", "198.51.100.1", 80]
        assert row["targets"] == [f"{world.near.ip4}:80", f"{world.far.ip4}:80"]
        assert (row["inside"], row["affinity_seconds"], row["masquerade"]) == ("balance", 100, "always")
        assert row["allowed"] == ["10.97.0.0/16"]
        assert ("node-port", "TCP", "", 30080) in rows


def test_an_endpoint_of_a_pool_touches_its_own_elements_only(world: World) -> None:
    with programmed(world.node) as (backend,):
        world.fill(backend)
        large = _many(40)
        before = _elements(world, FAMILY[4].endpoints.name)
        backend.put("super", service(cluster_ip("10.97.0.12", "fd00:97::12"), large[:-1], name="large"))
        after = _elements(world, FAMILY[4].endpoints.name)
        assert len(before - after) == 1
        assert not after - before


def _elements(world: World, name: str) -> set[str]:
    listed = world.node.run(["nft", "list", "map", "inet", "vcproxy", name]).stdout
    return {word.strip(" \t\n},") for word in listed.partition("elements = {")[2].split(",")}


def test_a_host_without_nft_is_told_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(BackendUnavailable, match="install the package nftables"):
        NftablesBackend({}).open()
