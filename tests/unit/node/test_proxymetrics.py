"""kube-proxy's metrics: what moves them, and that tenants do not."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass

import aiohttp
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.backend import broken
from tests.unit.node.conftest import FACTS, NODE, MakeRig, Rig, service_port
from vcproxy.model.addresses import parse_address
from vcproxy.model.node import NodeFacts
from vcproxy.model.services import ServicePort
from vcproxy.model.tenant import SUPER_UID, TenantModel
from vcproxy.model.timing import Timing
from vcproxy.node import proxymetrics
from vcproxy.node.content import extent
from vcproxy.node.holdings import Extent, TenantChanged
from vcproxy.ops import metrics

RULES = "kubeproxy_sync_proxy_rules"
WEB, DNS = service_port("web", "10.0.1.1"), service_port("dns", "10.0.1.2", vip="10.32.0.11")


@dataclass
class Since:
    """Metrics since this was made."""

    before: dict[tuple[str, tuple[tuple[str, str], ...]], float]

    @staticmethod
    def now() -> Since:
        return Since(
            {
                (sample.name, tuple(sorted(sample.labels.items()))): sample.value
                for family in metrics.REGISTRY.collect()
                for sample in family.samples
            }
        )

    def __call__(self, name: str, **labels: str) -> float:
        return metrics.value(name, labels) - self.before.get((name, tuple(sorted(labels.items()))), 0.0)

    def changed(self) -> set[str]:
        """kube-proxy's samples that are not what they were."""
        return {
            name
            for (name, labels), value in Since.now().before.items()
            if name.startswith("kubeproxy_") and self.before.get((name, labels), 0.0) != value
        }


@pytest.fixture
def since() -> Since:
    return Since.now()


async def test_a_full_sync_and_a_partial_one(make_rig: MakeRig, since: Since) -> None:
    rig = await make_rig(facts=FACTS)
    started = time.time()
    rig.sync(SUPER_UID, WEB, DNS)
    await rig.settle()
    rig.change(SUPER_UID, service_port("web", "10.0.1.1", "10.0.1.3"))
    await rig.settle()
    for family in ("IPv4", "IPv6"):
        assert since(f"{RULES}_duration_seconds_count", ip_family=family) == 2
        assert since("kubeproxy_sync_full_proxy_rules_duration_seconds_count", ip_family=family) == 1
        assert since("kubeproxy_sync_partial_proxy_rules_duration_seconds_count", ip_family=family) == 1
        for name in ("last_timestamp_seconds", "last_queued_timestamp_seconds"):
            assert started <= metrics.value(f"{RULES}_{name}", {"ip_family": family}) <= time.time()


async def test_a_first_load_in_chunks_is_full(make_rig: MakeRig, since: Since) -> None:
    rig = await make_rig(facts=FACTS, chunk=1)
    rig.sync(SUPER_UID, WEB, DNS)
    await rig.settle()
    assert since("kubeproxy_sync_full_proxy_rules_duration_seconds_count", ip_family="IPv4") == 2
    assert since("kubeproxy_sync_partial_proxy_rules_duration_seconds_count", ip_family="IPv4") == 0


async def test_a_sync_that_fails(make_rig: MakeRig, since: Since) -> None:
    rig = await make_rig(facts=FACTS)
    last = metrics.value(f"{RULES}_last_timestamp_seconds", {"ip_family": "IPv4"})
    rig.backend.fail = broken("apply", times=2)
    rig.sync(SUPER_UID, WEB)
    await rig.settle()
    assert since(f"{RULES}_nftables_sync_failures_total", ip_family="IPv6") == 1
    assert metrics.value(f"{RULES}_last_timestamp_seconds", {"ip_family": "IPv4"}) == last
    await rig.settle(after=10)
    await rig.settle(after=10)
    assert since(f"{RULES}_nftables_sync_failures_total", ip_family="IPv4") == 2
    assert since(f"{RULES}_duration_seconds_count", ip_family="IPv4") == 3, "kube-proxy counts those that failed too"
    assert metrics.value(f"{RULES}_last_timestamp_seconds", {"ip_family": "IPv4"}) > last


async def test_a_removal_that_fails_is_a_cleanup_that_failed(make_rig: MakeRig, since: Since) -> None:
    rig = await make_rig(facts=FACTS)
    rig.sync("acme", WEB)
    await rig.settle()
    rig.backend.fail = broken("remove_tenant", times=1)
    rig.remove("acme")
    await rig.settle()
    assert since(f"{RULES}_nftables_cleanup_failures_total", ip_family="IPv4") == 1
    assert since(f"{RULES}_nftables_sync_failures_total", ip_family="IPv4") == 0


@pytest.mark.parametrize(("call", "sync", "cleanup"), [("set_node", 1, 0), ("attach", 1, 0), ("tenants", 0, 1)])
async def test_a_duty_that_fails(make_rig: MakeRig, call: str, sync: int, cleanup: int) -> None:
    """What the node itself needs is the super cluster's too; looking for what is nobody's any more is a clean-up."""
    rig = await make_rig(facts=FACTS)
    rig.complete("acme")
    await rig.settle()
    before = Since.now()
    rig.backend.fail = broken(call, times=1)
    rig.facts(NodeFacts(zone="z", addresses=(parse_address("192.168.0.9"),)))
    rig.place({"10.0.1.9": "acme"})
    rig.complete("acme")
    await rig.settle()
    assert before(f"{RULES}_nftables_sync_failures_total", ip_family="IPv4") == sync
    assert before(f"{RULES}_nftables_cleanup_failures_total", ip_family="IPv4") == cleanup


def arrive(rig: Rig, change: Extent, timing: Timing | None = None) -> None:
    rig.agent.handle(TenantChanged(SUPER_UID, frozenset({WEB.key}), 9, timing, change))


async def test_changes_are_pending_until_a_sync_takes_them_up(make_rig: MakeRig, since: Since) -> None:
    rig = await make_rig(facts=FACTS)
    rig.sync(SUPER_UID, WEB)
    await rig.settle()
    arrive(rig, Extent(1, 1))
    arrive(rig, Extent(0, 2))
    assert metrics.value(f"{RULES}_service_changes_pending") == 1
    assert metrics.value(f"{RULES}_endpoint_changes_pending") == 3
    await rig.settle()
    assert metrics.value(f"{RULES}_service_changes_pending") == 0
    assert metrics.value(f"{RULES}_endpoint_changes_pending") == 0
    assert since(f"{RULES}_service_changes_total") == 1
    assert since(f"{RULES}_endpoint_changes_total") == 3


async def test_network_programming_is_reckoned_from_the_trigger(make_rig: MakeRig, since: Since) -> None:
    rig = await make_rig(facts=FACTS)
    rig.sync(SUPER_UID, WEB)
    await rig.settle()
    name = "kubeproxy_network_programming_duration_seconds"
    arrive(rig, Extent(0, 1), Timing(event=1))  # before this process was there
    await rig.settle()
    assert since(f"{name}_count", ip_family="IPv4") == 0
    arrive(rig, Extent(0, 1), Timing(event=time.time_ns()))
    await rig.settle()
    assert since(f"{name}_count", ip_family="IPv4") == 1
    assert since(f"{name}_count", ip_family="IPv6") == 0, "the Service has no IPv6 address"


async def test_services_without_local_endpoints(make_rig: MakeRig) -> None:
    rig = await make_rig(facts=FACTS)

    def count() -> float:
        labels = {"traffic_policy": "internal", "ip_family": "IPv4"}
        return metrics.value(f"{RULES}_no_local_endpoints_total", labels)

    def local(name: str, node: str) -> ServicePort:
        found = service_port(name, "10.0.1.1", nodes=(node,))
        return msgspec.structs.replace(found, internal_local=True)

    rig.sync(SUPER_UID, local("web", "elsewhere"), local("dns", NODE))
    await rig.settle()
    assert count() == 1
    rig.change(SUPER_UID, local("dns", "elsewhere"))
    await rig.settle()
    assert count() == 2
    rig.sync("acme", *(local(f"svc-{number}", "elsewhere") for number in range(9)))
    await rig.settle()
    assert count() == 2, "tenants' are not the super cluster's"
    rig.change(SUPER_UID, removed=(local("web", "").key,))
    await rig.settle()
    assert count() == 1


async def test_a_tenant_moves_none_of_them(make_rig: MakeRig) -> None:
    rig = await make_rig(facts=FACTS)
    await rig.settle()
    since = Since.now()
    rig.sync("acme", WEB, DNS)
    await rig.settle()
    rig.backend.fail = broken("apply", uid="acme", times=3)
    rig.change("acme", service_port("web", "10.0.1.9"))
    now = time.time_ns()
    rig.agent.handle(TenantChanged("acme", frozenset({WEB.key}), 3, Timing(event=now, received=now)))
    for _ in range(5):
        await rig.settle(after=10)
    assert since.changed() == set()
    assert since("vcproxy_propagation_seconds_count") == 1, "what all of them have is vcproxy's own"


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ([WEB], [WEB], Extent(0, 0)),
        ([], [WEB, DNS], Extent(2, 2)),
        ([WEB], [], Extent(1, 1)),
        ([WEB], [service_port("web", "10.0.1.1", "10.0.1.9")], Extent(0, 1)),
        ([WEB], [service_port("web", "10.0.1.1", vip="10.32.0.99")], Extent(1, 0)),
        ([WEB], [service_port("web", "10.0.1.9", vip="10.32.0.99")], Extent(1, 1)),
        ([], [service_port("web")], Extent(1, 0)),
        # Two ports of one Service are one change.
        ([], [WEB, msgspec.structs.replace(WEB, key=WEB.key._replace(port="https"))], Extent(1, 1)),
    ],
)
def test_the_extent_of_a_change(old: list[ServicePort], new: list[ServicePort], wanted: Extent) -> None:
    before, after = TenantModel(old), TenantModel(new)
    assert extent({**dict.fromkeys(after.ports), **before.ports}, after) == wanted


async def test_what_a_prometheus_reads() -> None:
    proxymetrics.begin()
    async with (
        metrics.serve("127.0.0.1:0", {"/metrics": metrics.show}) as address,
        aiohttp.ClientSession() as session,
        session.get(f"http://{address}/metrics") as answer,
    ):
        families = {family.name: family for family in text_string_to_metric_families(await answer.text())}
    (build,) = families["kubernetes_build_info"].samples
    assert build.labels["git_version"].startswith(f"v{proxymetrics.KUBERNETES}+vcproxy.")
    assert (build.labels["major"], build.labels["minor"]) == tuple(proxymetrics.KUBERNETES.split(".")[:2])
    assert families["kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds"].type == "gauge"
    assert families["kubeproxy_sync_proxy_rules_no_local_endpoints_total"].type == "gauge", "as kube-proxy's"
    assert not [name for name in families if name.endswith("_created")]


def test_a_brain_shows_none_of_them() -> None:
    script = "import vcproxy.brain.service as b; print(b.metrics.prometheus_client.generate_latest(b.metrics.REGISTRY))"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "vcproxy_nodes_connected" in shown
    assert "kubeproxy_" not in shown
