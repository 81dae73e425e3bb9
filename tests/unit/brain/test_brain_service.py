"""The whole brain, with real files, real API servers (small ones) and a real node session."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests.fakes.apiserver import FakeApiServer, Fault, fail
from tests.unit.brain.polling import until
from tests.unit.brain.test_directory_source import write
from tests.unit.brain.test_feed import publish
from tests.unit.brain.test_manifests import SERVICE, SLICE
from tests.unit.kube.test_lifetime import token
from vcproxy.brain.config import BrainConfiguration, DirectorySource, Listen, SuperCluster, Tenants, TenantSource
from vcproxy.brain.inputs import TENANT_KINDS, ApiInput
from vcproxy.brain.service import Brain
from vcproxy.model.addresses import parse_address
from vcproxy.node.config import BrainAddress
from vcproxy.node.dialling import Dialler
from vcproxy.node.holdings import FactsChanged, Holdings, PlacementChanged, TenantsComplete
from vcproxy.node.session import Session
from vcproxy.ops import admin, metrics, pki
from vcproxy.ops.configfile import ConfigError

POD: dict[str, Any] = {
    "metadata": {"namespace": "x", "name": "p", "labels": {"vcproxy.dev/tenant": "acme"}},
    "spec": {"nodeName": "n1"},
    "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}]},
}
NODE: dict[str, Any] = {
    "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "z"}},
    "spec": {"podCIDRs": ["10.0.0.0/24"]},
    "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
}


class Running:
    def __init__(self, directory: Path, config: BrainConfiguration) -> None:
        self.brain = Brain(config)
        self.config = config
        self.directory = directory

    async def ask(self, route: str = "/status", **parameters: str) -> Any:
        return await admin.fetch(self.config.admin_socket, route, parameters)

    def row(self, uid: str) -> Any:
        return self.brain.store.tenants().get(uid)

    def synced(self, *uids: str) -> bool:
        return all((stored := self.row(uid)) is not None and stored.synced for uid in uids)


def configured(directory: Path, super_cluster: SuperCluster | None, **more: Any) -> BrainConfiguration:
    authority = pki.Authority("test")
    certificate, key = authority.server(["brain"]).write(directory, "brain")
    authority.node("n1").write(directory, "n1")
    (directory / "ca.crt").write_bytes(authority.certificate)
    (directory / "tenants").mkdir(exist_ok=True)
    return BrainConfiguration(
        listen=Listen(
            address=f"unix:{directory}/grpc",
            cert_file=str(certificate),
            key_file=str(key),
            client_ca_file=str(directory / "ca.crt"),
        ),
        super_cluster=super_cluster,
        tenants=Tenants(sources=(TenantSource(directory=DirectorySource(path=str(directory / "tenants"))),), **more),
        state_directory=str(directory / "state"),
        admin_socket=str(directory / "brain.sock"),
        metrics_address="",
    )


@contextlib.asynccontextmanager
async def running(directory: Path, super_cluster: SuperCluster | None = None, **tenants: Any) -> AsyncIterator[Running]:
    found, stop = Running(directory, configured(directory, super_cluster, **tenants)), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(found.brain.run(stop))
        try:
            yield found
        finally:
            stop.set()


@contextlib.asynccontextmanager
async def node(directory: Path) -> AsyncIterator[tuple[Holdings, list[Any]]]:
    holdings, events = Holdings(), []
    address = BrainAddress(
        addresses=(f"unix:{directory}/grpc",),
        server_name="brain",
        cert_file=str(directory / "n1.crt"),
        key_file=str(directory / "n1.key"),
        ca_file=str(directory / "ca.crt"),
    )
    session = Session(
        node="n1", brains=address.addresses, connect=Dialler(address), holdings=holdings, sink=events.append
    )
    async with asyncio.TaskGroup() as group:
        task = group.create_task(session.run())
        try:
            yield holdings, events
        finally:
            task.cancel()


@pytest.fixture
async def super_api(tmp_path: Path) -> AsyncIterator[FakeApiServer]:
    async with FakeApiServer(token="super") as api:
        (tmp_path / "super.kubeconfig").write_bytes(api.kubeconfig())
        api.put("Node", NODE)
        api.put("Pod", POD)
        yield api


def super_cluster(directory: Path, **more: Any) -> SuperCluster:
    return SuperCluster(kubeconfig=str(directory / "super.kubeconfig"), **more)


def last(events: list[Any], kind: type[Any]) -> Any:
    return next((event for event in reversed(events) if isinstance(event, kind)), None)


async def test_a_super_cluster_and_tenants_reach_a_node(tmp_path: Path, super_api: FakeApiServer) -> None:
    publish(super_api, "kubernetes", "192.0.2.9")
    async with (
        FakeApiServer() as api,
        running(tmp_path, super_cluster(tmp_path)) as found,
        node(tmp_path) as (
            holdings,
            events,
        ),
    ):
        publish(api, "web", "10.0.0.1")
        write(tmp_path / "tenants" / "acme.kubeconfig", api.kubeconfig().decode())
        write(tmp_path / "tenants" / "globex" / "web.yaml", SERVICE)
        await until(lambda: found.synced("super", "dir-acme", "dir-globex"))

        def arrived() -> bool:
            return {uid for uid in holdings if (held := holdings.get(uid)) and held.synced} == {"super", "dir-acme"}

        await until(arrived)
        await until(lambda: last(events, TenantsComplete) is not None)
        assert last(events, PlacementChanged).addresses == {parse_address("10.0.0.1"): "dir-acme"}
        facts = last(events, FactsChanged).facts
        assert (facts.zone, facts.addresses) == ("z", (parse_address("192.0.2.1"),))
        for uid in ("super", "dir-acme"):
            held = holdings.get(uid)
            assert held is not None
            assert held.model.digest == found.row(uid).model.digest
        # A pod of another tenant is bound to the node.
        super_api.put(
            "Pod", POD | {"metadata": POD["metadata"] | {"name": "q", "labels": {"vcproxy.dev/tenant": "globex"}}}
        )
        await until(lambda: (held := holdings.get("dir-globex")) and held.synced)
        status = await found.ask()
        assert status["healthy"], status
        assert [row["node"] for row in status["nodes"]] == ["n1"]
        services = await found.ask("/services", tenant="acme")
        assert [row["service"] for row in services] == ["web"]
        # The tenant is deleted.
        (tmp_path / "tenants" / "acme.kubeconfig").unlink()
        await until(lambda: holdings.get("dir-acme") is None)
        with pytest.raises(admin.AdminError, match="acme"):
            await found.ask("/services", tenant="acme")


async def test_a_node_learns_that_its_node_is_on_its_way_out(tmp_path: Path, super_api: FakeApiServer) -> None:
    """Taint, deletionTimestamp, and gone; what it takes back comes back."""
    leaving = NODE | {"metadata": NODE["metadata"] | {"deletionTimestamp": "2026-01-01T00:00:00Z"}}
    tainted = NODE | {"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}}
    async with running(tmp_path, super_cluster(tmp_path)), node(tmp_path) as (_, events):

        async def eligible(wanted: bool) -> None:
            await until(lambda: (told := last(events, FactsChanged)) and told.facts.eligible is wanted)

        await eligible(True)
        for changed in (tainted, leaving):
            super_api.put("Node", changed)
            await eligible(False)
            assert last(events, FactsChanged).facts.addresses == (parse_address("192.0.2.1"),), "all else stays"
            super_api.put("Node", NODE)
            await eligible(True)
        super_api.delete("Node", "", "n1")
        await eligible(False)


async def test_without_a_super_cluster_tenants_go_where_their_files_say(
    tmp_path: Path, kubeconfig_of_nobody: str
) -> None:
    (tmp_path / "tenants").mkdir()
    write(tmp_path / "tenants" / "here" / "all.yaml", f"{SERVICE}---\n{SLICE}")
    write(tmp_path / "tenants" / "there" / "all.yaml", f"{SERVICE}---\n{SLICE.replace('n1', 'n2')}")
    write(tmp_path / "tenants" / "anywhere.kubeconfig", kubeconfig_of_nobody)
    async with running(tmp_path) as found:
        await until(lambda: found.synced("dir-here", "dir-there") and found.brain.placement.ready)
        placement = found.brain.placement
        assert placement.tenants("n1") == {"dir-here", "dir-anywhere"}
        assert placement.tenants("n2") == {"dir-there", "dir-anywhere"}
        assert placement.pods("n1") == {parse_address("10.0.0.1"): "dir-here"}
        assert not found.synced("dir-anywhere")
        await until(lambda: found.row("dir-anywhere").stale_since)
        status = await found.ask()
        assert not status["healthy"]


@pytest.fixture
async def kubeconfig_of_nobody() -> str:
    async with FakeApiServer() as api:
        return api.kubeconfig().decode()


async def test_ready_only_when_all_is_known(tmp_path: Path, super_api: FakeApiServer) -> None:
    fault = Fault(fail(503), path="/api/v1/pods")
    super_api.faults.append(fault)
    async with running(tmp_path, super_cluster(tmp_path)) as found:
        await until(lambda: found.synced("super"))
        await until(lambda: found.brain.tenants.complete)
        status = await found.ask()
        assert not status["ready"]
        assert any("Pods" in row["problem"] for row in status["problems"])
        super_api.faults.clear()
        await until(lambda: found.brain.placement.ready, timeout=30)


async def test_a_tenant_whose_access_is_bad_exists(tmp_path: Path) -> None:
    (tmp_path / "tenants").mkdir()
    write(tmp_path / "tenants" / "acme.kubeconfig", "nonsense\n")
    write(tmp_path / "tenants" / "good" / "web.yaml", SERVICE)
    async with running(tmp_path) as found:
        await until(lambda: found.synced("dir-good") and found.brain.placement.ready)
        assert not found.synced("dir-acme")
        assert "dir-acme" in found.brain.placement.tenants("n1"), "or the node would forget it"
        async with FakeApiServer() as api:
            write(tmp_path / "tenants" / "acme.kubeconfig", api.kubeconfig().decode())
            await until(lambda: found.synced("dir-acme"))
            assert (await found.ask())["problems"] == []
            publish(api, "late")
            api.token = "fresh"
            write(tmp_path / "tenants" / "acme.kubeconfig", api.kubeconfig().decode())
            publish(api, "web")
            await until(lambda: {key.service for key in found.row("dir-acme").model.ports} == {"late", "web"})
            assert found.row("dir-acme").stale_since is None


@pytest.mark.parametrize("watch_list", [False, True])
async def test_lists_are_streams_where_configured(tmp_path: Path, watch_list: bool) -> None:
    (tmp_path / "tenants").mkdir()
    async with FakeApiServer() as api:
        write(tmp_path / "tenants" / "acme.kubeconfig", api.kubeconfig().decode())
        async with running(tmp_path, watch_list=watch_list) as found:
            await until(lambda: found.synced("dir-acme"))
        streams = {path for _, path, query in api.requests if "sendInitialEvents" in query}
        lists = {path for verb, path, _ in api.requests if verb == "list"}
    both = {resource.path for resource in TENANT_KINDS}
    assert (streams, lists) == ((both, set()) if watch_list else (set(), both))


async def test_a_tenant_whose_access_turned_bad_has_what_it_had_before_the_restart(
    tmp_path: Path,
) -> None:
    (tmp_path / "tenants").mkdir()
    async with FakeApiServer() as api:
        publish(api, "web")
        write(tmp_path / "tenants" / "acme.kubeconfig", api.kubeconfig().decode())
        async with running(tmp_path) as found:
            await until(lambda: found.synced("dir-acme"))
        write(tmp_path / "tenants" / "acme.kubeconfig", "nonsense\n")
        async with running(tmp_path) as found:
            await until(lambda: found.synced("dir-acme"))
            row = found.row("dir-acme")
            assert row.restored
            assert {key.service for key in row.model.ports} == {"web"}
            assert row.stale_since
            assert counted() == {"restored": 1, "synced": 0, "not-synced": 0}
            publish(api, "late")
            write(tmp_path / "tenants" / "acme.kubeconfig", api.kubeconfig().decode())
            await until(lambda: {key.service for key in row.model.ports} == {"late", "web"} and not row.restored)
            assert row.stale_since is None
            assert counted() == {"restored": 0, "synced": 1, "not-synced": 0}


def counted() -> dict[str, float]:
    """Tenants by state, as the metric has it."""
    return {state: metrics.value("vcproxy_tenants", {"state": state}) for state in ("restored", "synced", "not-synced")}


async def test_the_super_cluster_for_its_pods_alone(tmp_path: Path, super_api: FakeApiServer) -> None:
    publish(super_api, "kubernetes")
    async with running(tmp_path, super_cluster(tmp_path, services=False)) as found:
        await until(lambda: found.brain.placement.ready)
        assert found.row("super") is None
        assert found.brain.placement.tenants("n1") == {"dir-acme"}


async def test_for_one_node_alone_other_nodes_are_not_read(tmp_path: Path, super_api: FakeApiServer) -> None:
    other = {**NODE, "metadata": {**NODE["metadata"], "name": "n2"}}
    super_api.put("Node", other)
    super_api.put("Pod", {**POD, "metadata": {**POD["metadata"], "name": "elsewhere"}, "spec": {"nodeName": "n2"}})
    async with running(tmp_path, super_cluster(tmp_path, node="n1")) as found:
        await until(lambda: found.brain.placement.ready)
        assert set(found.brain.placement.node_names().values()) == {"n1"}
        assert found.brain.placement.tenants("n1") == {"super", "dir-acme"}
        assert found.brain.placement.tenants("n2") == {"super"}


async def test_without_its_pods_tenants_go_to_every_node_and_no_right_to_read_them_is_needed(
    tmp_path: Path, super_api: FakeApiServer
) -> None:
    (tmp_path / "tenants").mkdir()
    async with FakeApiServer() as api:
        (tmp_path / "tenants" / "acme.kubeconfig").write_bytes(api.kubeconfig())
        super_api.faults.append(Fault(fail(403), path="/api/v1/pods"))
        async with running(tmp_path, super_cluster(tmp_path, node="n1", pods=False)) as found:
            await until(lambda: found.brain.placement.ready)
            assert found.brain.placement.tenants("n1") == {"super", "dir-acme"}
            assert not [path for _, path, _ in super_api.requests if path == "/api/v1/pods"]


async def test_refusals_can_be_looked_up(tmp_path: Path) -> None:
    (tmp_path / "tenants").mkdir()
    text = SERVICE.replace("  ports:", "  externalIPs: [203.0.113.1]\n  ports:")
    write(tmp_path / "tenants" / "acme" / "web.yaml", text)
    async with running(tmp_path) as found:
        await until(lambda: found.synced("dir-acme"))
        (row,) = await found.ask("/refusals", tenant="acme", service="web")
        assert (row["field"], row["reason"]) == ("spec.externalIPs", "external-ip-not-granted")
        assert (await found.ask("/tenants"))[0]["refused"] == 1
        explained = await found.ask("/explain", tenant="acme", service="web")
        assert explained["refused"] == [row]
        assert [said["by"] for said in explained["virtual"]] == ["the Service"]
        assert explained["ports"], "the rest of it is served"
        with pytest.raises(admin.AdminError, match="nobody"):
            await found.ask("/explain", tenant="nobody", service="web")


async def test_sigterm_ends_it_cleanly(tmp_path: Path) -> None:
    brain = Brain(configured(tmp_path, None))
    async with asyncio.TaskGroup() as group:
        group.create_task(brain.run())
        await until(lambda: brain.placement.ready)
        os.kill(os.getpid(), signal.SIGTERM)
    assert not (tmp_path / "brain.sock").exists()


def test_a_configuration_that_cannot_be_used(tmp_path: Path) -> None:
    from vcproxy.brain.config import TenantPolicy

    with pytest.raises(ConfigError, match=r"tenants\.policy\.backends: sameTenantPods needs .* set superCluster"):
        Brain(configured(tmp_path, None, policy=TenantPolicy(backends="sameTenantPods")))


def test_a_super_cluster_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"superCluster: .*none"):
        Brain(configured(tmp_path, SuperCluster(kubeconfig=str(tmp_path / "none"))))


async def test_the_first_load_ends_when_every_tenant_is_synced_or_out_of_reach(tmp_path: Path) -> None:
    async with FakeApiServer() as well, FakeApiServer() as ill:
        ill.faults.append(Fault(fail(500)))
        publish(well, "web")
        (tmp_path / "tenants").mkdir()
        write(tmp_path / "tenants" / "well.kubeconfig", well.kubeconfig().decode())
        write(tmp_path / "tenants" / "ill.kubeconfig", ill.kubeconfig().decode())
        with structlog.testing.capture_logs() as logs:
            async with running(tmp_path) as found:
                await until(lambda: any(said["event"] == "loaded" for said in logs))
                assert found.synced("dir-well") and not found.synced("dir-ill")
    [said] = [said for said in logs if said["event"] == "loaded"]
    assert (said["tenants"], said["synced"]) == (2, 1)


async def test_credentials_that_have_ended_are_a_problem_until_renewed(tmp_path: Path) -> None:
    async with FakeApiServer(token=token(iat=0, exp=1)) as api:
        write(tmp_path / "tenants" / "acme.kubeconfig", api.kubeconfig().decode())
        async with running(tmp_path) as found:
            await until(lambda: found.synced("dir-acme"))
            [row] = (await found.ask())["problems"]
            assert row["problem"].startswith("tenant dir-acme: its credentials have expired at 1970-01-01T00:00:01Z")
            api.token = "renewed"
            write(tmp_path / "tenants" / "acme.kubeconfig", api.kubeconfig().decode())
            await until(lambda: not found.brain.tenants.problems())


async def test_status_says_how_new_is_what_is_known(tmp_path: Path) -> None:
    async with FakeApiServer() as api:
        api.faults.append(Fault(fail(503), path="/apis/discovery.k8s.io", verb="list", times=1))
        write(tmp_path / "tenants" / "acme.kubeconfig", api.kubeconfig().decode())
        before = time.time()
        async with running(tmp_path) as found:
            await until(lambda: found.row("dir-acme") is not None and found.row("dir-acme").stale_since is not None)
            [row] = await found.ask("/tenants")
            assert row["heardAt"] is None
            await until(lambda: found.synced("dir-acme"))
            for kind in ("Service", "EndpointSlice"):
                await api.watching(kind)
            [row] = await found.ask("/tenants")
            first = row["heardAt"]
            assert before <= first <= time.time()
            for kind in ("Service", "EndpointSlice"):
                api.bookmark(kind)
            source = found.brain.tenants.feeds["dir-acme"].source
            assert isinstance(source, ApiInput)
            await until(lambda: (source.heard or 0) > first)
