"""The agent with a scripted session and a backend in memory: what is programmed, when, and what is left alone."""

import asyncio
import threading

import msgspec
import pytest

from tests.fakes.backend import FakeBackend, Kernel, broken
from tests.unit.node.conftest import FACTS, NODE, MakeRig, service_port
from vcproxy.backend.protocol import BackendUnavailable, TenantUpdate
from vcproxy.model.addresses import parse_address, parse_prefix
from vcproxy.model.node import NodeFacts
from vcproxy.model.tenant import Tenant, TenantModel
from vcproxy.node.attachments import QUARANTINE
from vcproxy.node.config import Attachment, DetectLocal, InterfaceAttachment, NodeConfiguration
from vcproxy.node.holdings import Held, TenantChanged, TenantStale, TenantSynced
from vcproxy.node.resolver import NodeView, resolve

WEB = service_port("web", "10.0.1.1", "10.0.2.2")
DNS = service_port("dns", "10.0.1.3", vip="10.32.0.53")


def held(uid: str, *ports: object, revision: int = 7) -> Held:
    return Held(Tenant(uid, uid), TenantModel(ports), revision, "brain-0", synced=True)  # type: ignore[arg-type]


def applies(backend: FakeBackend) -> list[str]:
    return [uid for method, uid in backend.calls if method == "apply"]


async def test_a_snapshot_is_programmed_and_acknowledged(make_rig: MakeRig) -> None:
    rig = await make_rig()
    content = rig.sync("acme", WEB, DNS, revision=3)
    await rig.settle()
    assert list(rig.backend.kernel.tables["acme"].values()) == resolve([WEB, DNS], NodeView.of(NODE))
    assert rig.acks.commits == [("acme", 3, content.model.digest, ())]
    assert rig.memory.kept == ["acme"]


async def test_a_delta_programs_the_touched_ports_alone(make_rig: MakeRig) -> None:
    rig = await make_rig()
    rig.sync("acme", WEB, DNS)
    await rig.settle()
    rig.change("acme", service_port("web", "10.0.1.9"))
    await rig.settle()
    assert [[port.key.service for port in update.put] for update in rig.backend.updates[1:]] == [["web"]]
    rig.change("acme", removed=(DNS.key,))
    await rig.settle()
    assert rig.backend.updates[-1] == TenantUpdate("acme", removed=(DNS.key,))
    assert rig.programmed("acme") == {"web"}
    assert rig.acks.revisions == [("acme", 1), ("acme", 2), ("acme", 3)]


async def test_changes_that_come_while_the_backend_works_become_one_update(make_rig: MakeRig) -> None:
    rig = await make_rig()
    rig.sync("acme", WEB)
    await rig.settle()
    for last in range(5, 10):
        rig.change("acme", service_port("web", f"10.0.1.{last}"))
        rig.change("acme", service_port(f"new-{last}", "10.0.1.1"))
    await rig.settle()
    assert len(rig.backend.updates) == 2
    assert len(rig.backend.updates[1].put) == 6
    assert rig.acks.revisions[-1] == ("acme", 11)


async def test_changes_during_a_call_are_not_acknowledged_with_it(make_rig: MakeRig) -> None:
    rig = await make_rig()
    entered, leave = threading.Event(), threading.Event()

    def gate(method: str, uid: str) -> None:
        if method == "apply" and not leave.is_set():
            entered.set()
            leave.wait(10)

    rig.backend.gate = gate
    first = rig.sync("acme", WEB).model.digest
    settling = asyncio.gather(rig.settle())
    await asyncio.to_thread(entered.wait, 10)
    second = rig.change("acme", DNS).model.digest
    leave.set()
    await settling
    assert [(revision, digest) for _, revision, digest, _ in rig.acks.commits] == [(1, first), (2, second)]


async def test_tenants_take_turns(make_rig: MakeRig) -> None:
    rig = await make_rig()
    for uid in ("busy", "quiet-1", "quiet-2"):
        rig.sync(uid, WEB)
    await rig.settle()
    before = len(rig.backend.calls)
    rig.change("busy", DNS)
    rig.change("quiet-1", DNS)
    rig.backend.gate = lambda method, uid: None
    rig.change("busy", service_port("more", "10.0.1.7"))
    rig.change("quiet-2", DNS)
    await rig.settle()
    assert [uid for method, uid in rig.backend.calls[before:] if method == "apply"] == ["busy", "quiet-1", "quiet-2"]


class TestNotSyncedNeverMeansEmpty:
    async def test_nothing_of_an_unsynced_tenant_is_programmed(self, make_rig: MakeRig) -> None:
        kernel = Kernel()
        first = await make_rig(kernel=kernel)
        first.sync("acme", WEB)
        await first.settle()

        second = await make_rig(kernel=kernel)
        second.holdings.put(Held(Tenant("acme", "acme"), TenantModel([DNS]), 1, "brain-2", synced=False))
        second.agent.handle(TenantChanged("acme", None, 1))
        await second.settle()
        assert second.programmed("acme") == {"web"}
        assert applies(second.backend) == []

        second.holdings.tenants["acme"].synced = True
        second.agent.handle(TenantSynced("acme"))
        await second.settle()
        assert second.programmed("acme") == {"dns"}

    async def test_an_empty_tenant_that_is_synced_is_empty(self, make_rig: MakeRig) -> None:
        kernel = Kernel()
        first = await make_rig(kernel=kernel)
        first.sync("acme", WEB)
        await first.settle()
        second = await make_rig(kernel=kernel)
        second.sync("acme")
        await second.settle()
        assert second.programmed("acme") == set()
        assert second.acks.revisions == [("acme", 1)]

    async def test_what_an_earlier_run_left_stays_until_the_brain_named_all_tenants(self, make_rig: MakeRig) -> None:
        kernel = Kernel()
        first = await make_rig(kernel=kernel)
        first.sync("acme", WEB)
        first.sync("gone", WEB)
        await first.settle()

        second = await make_rig(kernel=kernel)
        second.sync("acme", WEB)
        await second.settle()
        assert second.programmed("gone") == {"web"}
        second.complete("acme")
        await second.settle()
        assert "gone" not in kernel.tables
        assert second.programmed("acme") == {"web"}

    async def test_a_stale_tenant_keeps_forwarding(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        rig.sync("acme", WEB)
        await rig.settle()
        before = rig.backend.operations
        rig.agent.handle(TenantStale("acme", 5.0, "connection refused"))
        await rig.settle()
        assert rig.backend.operations == before

    async def test_attachments_of_an_earlier_run_stay_until_the_brain_named_all_tenants(
        self, make_rig: MakeRig
    ) -> None:
        kernel = Kernel()
        first = await make_rig(kernel=kernel)
        first.place({"10.0.1.1": "acme"})
        first.complete("acme")
        first.sync("acme", WEB)
        await first.settle()
        attached = kernel.attachments
        assert attached.addresses == {parse_address("10.0.1.1"): "acme"}

        second = await make_rig(kernel=kernel)
        second.sync("acme", WEB)
        await second.settle()
        assert kernel.attachments == attached
        second.place({"10.0.1.2": "acme"})
        await second.settle()
        assert len(kernel.attachments.addresses) == 2
        second.complete("acme")
        await second.settle()
        assert kernel.attachments.addresses == {parse_address("10.0.1.2"): "acme"}

    async def test_a_pod_that_was_attached_and_not_yet_remembered_stays_attached(self, make_rig: MakeRig) -> None:
        """Killed between the attachment and the file, with the brain down: the file lacks the newest pod, and knows
        one by the tenant that had its address before."""
        kernel = Kernel()
        first = await make_rig(kernel=kernel)
        first.place({"10.0.1.1": "acme", "10.0.1.2": "acme", "10.0.1.3": "globex"})
        first.complete("acme", "globex")
        await first.settle()
        attached = kernel.attachments

        older = {parse_address("10.0.1.1"): "acme", parse_address("10.0.1.3"): "acme"}
        second = await make_rig(kernel=kernel, facts=FACTS, placement=older)
        await second.settle()
        assert kernel.attachments == attached

    async def test_node_facts_of_an_earlier_run_stay_until_the_brain_tells_them(self, make_rig: MakeRig) -> None:
        kernel = Kernel()
        first = await make_rig(kernel=kernel)
        first.facts()
        await first.settle()
        assert kernel.node.node_addresses == FACTS.addresses
        second = await make_rig(kernel=kernel)
        await second.settle()
        assert kernel.node.node_addresses == FACTS.addresses
        assert ("set_node", "") not in second.backend.calls


class TestRestart:
    async def test_what_is_remembered_and_still_programmed_costs_nothing(self, make_rig: MakeRig) -> None:
        kernel, placement = Kernel(), {parse_address("10.0.1.1"): "acme"}
        first = await make_rig(kernel=kernel, facts=FACTS, placement=placement)
        first.sync("acme", WEB, DNS)
        await first.settle()
        second = await make_rig(kernel=kernel, remembered=[held("acme", WEB, DNS)], facts=FACTS, placement=placement)
        second.agent.handle(TenantSynced("acme"))
        await second.settle()
        assert second.backend.operations == 0
        assert second.acks.revisions == [("acme", 7)]

    async def test_what_is_programmed_is_not_replaced_by_older_memory(self, make_rig: MakeRig) -> None:
        kernel = Kernel()
        first = await make_rig(kernel=kernel, facts=FACTS)
        first.sync("acme", WEB, DNS)
        await first.settle()
        second = await make_rig(kernel=kernel, remembered=[held("acme", WEB)], facts=FACTS)
        second.facts(NodeFacts(zone="elsewhere"))
        second.agent.handle(TenantChanged("acme", frozenset(), 7))  # facts of the tenant, not its content
        await second.settle()
        assert second.programmed("acme") == {"web", "dns"}
        assert second.agent.adopted == {"acme"}
        assert second.acks.revisions == []

        second.change("acme", DNS)
        await second.settle()
        assert second.programmed("acme") == {"web", "dns"}
        assert second.agent.adopted == set()
        assert second.acks.revisions == [("acme", 8)]

    async def test_memory_of_a_tenant_that_is_gone_is_not_kept(self, make_rig: MakeRig) -> None:
        kernel = Kernel()
        first = await make_rig(kernel=kernel, facts=FACTS)
        first.sync("acme", WEB)
        await first.settle()
        second = await make_rig(kernel=kernel, remembered=[held("acme", WEB)], facts=FACTS)
        second.remove("acme")
        await second.settle()
        assert second.programmed("acme") == set()
        assert second.agent.adopted == set()
        assert second.memory.forgotten == ["acme"]

    async def test_what_is_remembered_is_programmed_with_the_brain_down(self, make_rig: MakeRig) -> None:
        rig = await make_rig(remembered=[held("acme", WEB), held("beta", DNS)], facts=FACTS)
        assert rig.programmed("acme") == {"web"}
        assert rig.programmed("beta") == {"dns"}

    async def test_the_node_and_its_attachments_come_before_the_tables(self, make_rig: MakeRig) -> None:
        placement = {parse_address("10.0.1.1"): "acme"}
        rig = await make_rig(remembered=[held("acme", WEB)], facts=FACTS, placement=placement)
        methods = [method for method, _ in rig.backend.calls if method in ("open", "set_node", "attach", "apply")]
        assert methods[0] == "open"
        assert methods[-1] == "apply"
        assert set(methods) == {"open", "set_node", "attach", "apply"}

    async def test_a_brain_that_says_the_same_costs_nothing_and_is_acknowledged(self, make_rig: MakeRig) -> None:
        rig = await make_rig(remembered=[held("acme", WEB)], facts=FACTS)
        calls = len(rig.backend.calls)
        rig.holdings.tenants["acme"].revision = 40
        rig.agent.handle(TenantSynced("acme"))
        await rig.settle()
        assert rig.acks.revisions[-1] == ("acme", 40)
        assert rig.backend.calls[calls:] == []

    async def test_a_backend_that_cannot_work_here_ends_the_start(self, make_rig: MakeRig) -> None:
        def prepare(backend: FakeBackend) -> None:
            backend.fail = lambda method, uid: BackendUnavailable("no nft: install nftables")

        with pytest.raises(BackendUnavailable, match="install nftables"):
            await make_rig(prepare=prepare)

    async def test_a_backend_that_is_only_busy_at_the_start_is_tried_again(self, make_rig: MakeRig) -> None:
        def prepare(backend: FakeBackend) -> None:
            backend.fail = broken("open", times=2)

        rig = await make_rig(prepare=prepare)
        assert [method for method, _ in rig.backend.calls][:3] == ["open", "open", "open"]


class TestFailures:
    async def test_a_failing_tenant_waits_alone_and_recovers(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        rig.backend.fail = broken("apply", times=2, uid="acme")
        rig.sync("acme", WEB)
        rig.sync("beta", DNS)
        await rig.settle()
        assert rig.programmed("beta") == {"dns"}
        assert rig.programmed("acme") == set()
        assert rig.acks.failures == [("acme", 1, "apply fails on order")]

        await rig.settle(after=0.049)
        assert len(rig.acks.failures) == 1, "tried before its backoff was over"
        await rig.settle(after=0.002)
        assert len(rig.acks.failures) == 2
        await rig.settle(after=0.06)
        assert len(rig.acks.failures) == 2, "the second backoff is longer than the first"
        await rig.settle(after=0.1)
        assert rig.programmed("acme") == {"web"}
        assert rig.acks.revisions == [("beta", 1), ("acme", 1)]

    async def test_what_changed_during_a_backoff_is_in_the_retry(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        rig.sync("acme", WEB)
        await rig.settle()
        rig.backend.fail = broken("apply", times=1)
        rig.change("acme", DNS)
        await rig.settle()
        rig.change("acme", removed=(WEB.key,))
        await rig.settle(after=1)
        assert rig.programmed("acme") == {"dns"}
        assert rig.acks.revisions == [("acme", 1), ("acme", 3)]

    async def test_a_fault_of_the_backend_is_survived_like_an_error(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        faults = [ZeroDivisionError("a bug")]
        rig.backend.fail = lambda method, uid: faults.pop() if method == "apply" and faults else None
        rig.sync("acme", WEB)
        await rig.settle()
        assert rig.acks.failures == [("acme", 1, "a bug")]
        await rig.settle(after=1)
        assert rig.programmed("acme") == {"web"}

    async def test_a_rejected_port_keeps_its_last_good_form_and_the_rest_is_committed(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        rig.sync("acme", WEB, DNS)
        await rig.settle()
        good = rig.backend.kernel.tables["acme"][WEB.key]
        rig.backend.refuse = lambda uid, key: "the node port is taken" if key == WEB.key else ""
        rig.change("acme", service_port("web", "10.0.1.77"), service_port("dns", "10.0.1.78", vip="10.32.0.53"))
        await rig.settle()
        assert rig.backend.kernel.tables["acme"][WEB.key] == good
        assert rig.backend.kernel.tables["acme"][DNS.key].cluster4[:4] == parse_address("10.0.1.78")
        ((_, _, _, first), (_, revision, _, second)) = rig.acks.commits
        assert first == ()
        assert [(revision, rejection.key, rejection.reason) for rejection in second] == [
            (2, WEB.key, "the node port is taken")
        ]

        rig.change("acme", service_port("other", "10.0.1.1"))
        await rig.settle()
        assert len(rig.acks.commits[-1][3]) == 1, "still in quarantine"

        rig.backend.refuse = lambda uid, key: ""
        await rig.settle(after=61)
        assert rig.backend.kernel.tables["acme"][WEB.key].cluster4[:4] == parse_address("10.0.1.77")
        assert rig.acks.commits[-1][3] == ()

    async def test_a_failing_removal_is_tried_again(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        rig.sync("acme", WEB)
        await rig.settle()
        rig.backend.fail = broken("remove_tenant", times=1)
        rig.remove("acme")
        await rig.settle()
        assert rig.programmed("acme") == {"web"}
        assert rig.memory.forgotten == []
        await rig.settle(after=1)
        assert "acme" not in rig.backend.kernel.tables
        assert rig.memory.forgotten == ["acme"]

    async def test_failing_duties_do_not_hold_up_tenants(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        rig.backend.fail = broken("attach", "set_node", times=2)
        rig.facts()
        rig.place({"10.0.1.1": "acme"})
        rig.sync("acme", WEB)
        await rig.settle()
        assert rig.programmed("acme") == {"web"}
        await rig.settle(after=1)
        assert rig.backend.kernel.node.node_addresses == FACTS.addresses
        assert rig.backend.kernel.attachments.addresses


class TestGone:
    async def test_a_gone_tenant_is_removed_and_forgotten(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        rig.sync("acme", WEB)
        await rig.settle()
        rig.remove("acme")
        await rig.settle()
        assert "acme" not in rig.backend.kernel.tables
        assert rig.memory.forgotten == ["acme"]
        assert rig.agent.progress.tenants == {}

    async def test_a_tenant_that_comes_back_before_its_removal_is_replaced(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        rig.sync("acme", WEB)
        await rig.settle()
        rig.remove("acme")
        rig.sync("acme", DNS, revision=5)
        await rig.settle()
        assert rig.programmed("acme") == {"dns"}
        assert rig.memory.forgotten == []

    async def test_a_tenant_that_is_announced_again_keeps_forwarding_until_it_is_synced(
        self, make_rig: MakeRig
    ) -> None:
        rig = await make_rig()
        rig.sync("acme", WEB)
        await rig.settle()
        rig.remove("acme")
        rig.holdings.put(Held(Tenant("acme", "acme")))
        await rig.settle()
        assert rig.programmed("acme") == {"web"}
        rig.sync("acme", DNS)
        await rig.settle()
        assert rig.programmed("acme") == {"dns"}
        assert rig.backend.updates[-1].complete

    async def test_a_device_of_a_gone_tenant_does_not_fall_to_the_super_cluster(self, make_rig: MakeRig) -> None:
        overlay = (Attachment(interface=InterfaceAttachment(tenant="*", names=("vx-{tenant}",))),)
        rig = await make_rig(attachments=overlay, links=frozenset({"vx-acme", "eth0"}))
        rig.sync("uid-1", WEB, name="acme")
        await rig.settle()
        assert rig.backend.kernel.attachments.interfaces == {"vx-acme": "uid-1"}
        rig.remove("uid-1")
        await rig.settle()
        assert rig.backend.kernel.attachments.interfaces == {"vx-acme": "uid-1"}
        rig.sync("uid-2", WEB, name="acme")
        await rig.settle()
        assert rig.backend.kernel.attachments.interfaces == {"vx-acme": "uid-2"}
        rig.agent.see_links(frozenset({"eth0"}), frozenset())
        await rig.settle()
        assert rig.backend.kernel.attachments.interfaces == {}


class TestAttachments:
    async def test_a_tenant_is_attached_before_its_first_table(self, make_rig: MakeRig) -> None:
        overlay = (Attachment(interface=InterfaceAttachment(tenant="acme", names=("br-acme",))),)
        rig = await make_rig(attachments=overlay, links=frozenset({"br-acme"}))
        assert rig.backend.kernel.attachments.interfaces == {"br-acme": QUARANTINE}
        rig.sync("uid-1", WEB, name="acme")
        calls = len(rig.backend.calls)
        await rig.settle()
        assert rig.backend.calls[calls:] == [("attach", ""), ("apply", "uid-1")]
        assert rig.backend.kernel.attachments.interfaces == {"br-acme": "uid-1"}

    async def test_a_device_that_appears_is_attached(self, make_rig: MakeRig) -> None:
        overlay = (Attachment(interface=InterfaceAttachment(tenant="acme", names=("vx-acme*",))),)
        rig = await make_rig(attachments=overlay)
        rig.sync("uid-1", WEB, name="acme")
        await rig.settle()
        rig.agent.see_links(frozenset({"vx-acme0", "vx-beta"}), frozenset())
        await rig.settle()
        assert rig.backend.kernel.attachments.interfaces == {"vx-acme0": "uid-1"}

    async def test_placement_that_changes_nothing_costs_no_call(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        rig.place({"10.0.1.1": "acme"})
        await rig.settle()
        calls = len(rig.backend.calls)
        rig.place({"10.0.1.1": "acme"})
        await rig.settle()
        assert rig.backend.calls[calls:] == []

    async def test_what_the_brain_told_of_the_node_is_remembered(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        rig.facts()
        rig.place({"10.0.1.1": "acme"})
        assert rig.memory.node == (FACTS, {parse_address("10.0.1.1"): "acme"})


class TestFacts:
    async def test_a_change_of_zone_resolves_hinted_ports_anew(self, make_rig: MakeRig) -> None:
        from vcproxy.model.endpoints import READY, SERVING, Endpoint, HintSet, name_id, pack
        from vcproxy.model.services import ServicePort

        packed, _, hints = pack(
            Endpoint(parse_address(f"10.0.{at}.1"), 8080, READY | SERVING, 0, HintSet((name_id(zone),), ()))
            for at, zone in enumerate(("zone-a", "zone-b"))
        )
        hinted = ServicePort(WEB.key._replace(service="hinted"), WEB.frontends, hint_sets=hints, endpoints4=packed)
        rig = await make_rig(facts=FACTS)
        rig.sync("acme", hinted, DNS)
        await rig.settle()
        table = rig.backend.kernel.tables["acme"]
        assert table[hinted.key].cluster4[:4] == parse_address("10.0.0.1")
        rig.facts(NodeFacts(zone="zone-b", addresses=FACTS.addresses))
        await rig.settle()
        table = rig.backend.kernel.tables["acme"]
        assert table[hinted.key].cluster4[:4] == parse_address("10.0.1.1")
        assert [port.key.service for port in rig.backend.updates[-1].put] == ["hinted"]

    async def test_a_change_of_node_addresses_reaches_the_backend(self, make_rig: MakeRig) -> None:
        rig = await make_rig(facts=FACTS)
        rig.facts(NodeFacts(zone="zone-a", addresses=(parse_address("192.168.0.3"),)))
        await rig.settle()
        assert rig.backend.kernel.node.node_addresses == (parse_address("192.168.0.3"),)

    async def test_a_node_object_that_is_gone_changes_nothing_until_there_is_one_again(self, make_rig: MakeRig) -> None:
        config = NodeConfiguration(detect_local=DetectLocal(mode="NodeCIDR"))
        rig = await make_rig(facts=FACTS, config=config)
        before = rig.backend.kernel.node
        assert before.node_addresses == FACTS.addresses
        assert before.local_sources == FACTS.pod_ranges
        rig.facts(NodeFacts(eligible=False))
        await rig.settle()
        assert rig.backend.kernel.node == before
        assert rig.agent.zone == "zone-a"
        assert rig.memory.node[0] == msgspec.structs.replace(FACTS, eligible=False)
        rig.facts(NodeFacts(addresses=(parse_address("192.168.0.7"),), pod_ranges=(parse_prefix("10.0.7.0/24"),)))
        await rig.settle()
        after = rig.backend.kernel.node
        assert after.node_addresses == (parse_address("192.168.0.7"),)
        assert after.local_sources == (parse_prefix("10.0.7.0/24"),)

    async def test_a_change_of_virtual_ranges_alone_is_programmed(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        content = rig.sync("acme", WEB)
        await rig.settle()
        content.tenant = Tenant("acme", "acme", (parse_prefix("10.32.0.0/16"),))
        rig.agent.handle(TenantChanged("acme", frozenset(), 1))
        await rig.settle()
        assert rig.backend.kernel.ranges["acme"] == (parse_prefix("10.32.0.0/16"),)
        assert rig.programmed("acme") == {"web"}


class TestFirstLoad:
    async def test_a_huge_tenant_is_loaded_in_turns_with_the_others(self, make_rig: MakeRig) -> None:
        rig = await make_rig(chunk=10)
        many = [service_port(f"svc-{at}", "10.0.1.1", vip=f"10.32.1.{at}") for at in range(35)]
        rig.sync("huge", *many)
        rig.sync("small", WEB)
        await rig.settle()
        assert applies(rig.backend) == ["huge", "small", "huge", "huge", "huge"]
        assert len(rig.programmed("huge")) == 35
        assert rig.acks.revisions == [("small", 1), ("huge", 1)], "acknowledged once, when it was complete"

    async def test_a_failure_in_the_middle_loses_nothing(self, make_rig: MakeRig) -> None:
        rig = await make_rig(chunk=10)
        many = [service_port(f"svc-{at}", "10.0.1.1", vip=f"10.32.1.{at}") for at in range(35)]
        rig.sync("huge", *many)
        fail, count = broken("apply", times=1), iter(range(100))
        rig.backend.fail = lambda method, uid: fail(method, uid) if method == "apply" and next(count) >= 2 else None
        await rig.settle()
        assert 0 < len(rig.programmed("huge")) < 35
        rig.change("huge", removed=(many[0].key,))
        await rig.settle(after=1)
        assert len(rig.programmed("huge")) == 34
        assert rig.acks.revisions == [("huge", 2)]

    async def test_a_tenant_that_is_programmed_is_replaced_in_one_update(self, make_rig: MakeRig) -> None:
        rig = await make_rig(chunk=10)
        rig.sync("huge", WEB)
        await rig.settle()
        rig.sync("huge", *[service_port(f"svc-{at}", "10.0.1.1", vip=f"10.32.1.{at}") for at in range(35)])
        await rig.settle()
        assert len(rig.backend.updates) == 2
        assert rig.backend.updates[1].complete


async def until(condition: object, *, deadline: float = 10) -> None:
    async with asyncio.timeout(deadline):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110 - what is awaited has no event
            await asyncio.sleep(0.005)


class TestDrift:
    async def test_a_table_deleted_by_hand_is_back(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        rig.sync("acme", WEB)
        running = asyncio.gather(rig.agent.run())
        try:
            await until(lambda: rig.programmed("acme"))
            rig.backend.kernel.tables.clear()
            rig.backend.touch()
            await until(lambda: rig.programmed("acme") == {"web"}, deadline=1)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def test_own_changes_cause_no_repair(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        running = asyncio.gather(rig.agent.run())
        try:
            for _ in range(3):
                rig.backend.touch(foreign=False)
                seen = rig.backend.calls.count(("drifted", ""))
                await until(lambda seen=seen: rig.backend.calls.count(("drifted", "")) > seen)
            assert ("repair", "") not in rig.backend.calls
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def test_a_repair_that_fails_is_tried_again_though_nothing_new_is_announced(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        rig.sync("acme", WEB)
        await rig.settle()
        rig.backend.kernel.tables.clear()
        rig.backend.fail = broken("repair", times=2)
        rig.backend.touch()
        await until(lambda: next(rig.agent.waiting(), None))
        await rig.settle()
        assert rig.programmed("acme") == set()
        await rig.settle(after=0.06)
        await rig.settle(after=0.11)
        assert rig.programmed("acme") == {"web"}

    async def test_a_fight_over_the_table_is_paced(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        rig.sync("acme", WEB)
        await rig.settle()

        def fight(method: str, uid: str) -> None:
            if method == "repair":
                rig.backend.touch()

        rig.backend.gate = fight
        rig.backend.touch()
        await until(lambda: next(rig.agent.waiting(), None))
        for _ in range(3):
            await rig.settle(after=0.01)
        assert rig.backend.calls.count(("repair", "")) == 1
        await rig.settle(after=0.3)
        assert rig.backend.calls.count(("repair", "")) == 2


async def test_ending_waits_for_the_call_under_way(make_rig: MakeRig) -> None:
    rig = await make_rig()
    entered, leave = threading.Event(), threading.Event()

    def gate(method: str, uid: str) -> None:
        if method == "apply":
            entered.set()
            leave.wait(10)

    rig.backend.gate = gate
    rig.sync("acme", WEB)
    running = asyncio.gather(rig.agent.run())
    await asyncio.to_thread(entered.wait, 10)
    running.cancel()
    asyncio.get_running_loop().call_later(0.02, leave.set)
    await asyncio.gather(running, return_exceptions=True)
    assert rig.programmed("acme") == {"web"}
