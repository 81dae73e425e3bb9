"""The node agent as a process would run it, with the brain down and a backend in memory."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from tests.fakes.apiserver import FakeApiServer
from tests.fakes.backend import FakeBackend, Kernel
from tests.unit.node.conftest import FACTS, NODE, service_port
from vcproxy.brain.config import Listen
from vcproxy.brain.distribution import Distributor
from vcproxy.brain.placement import Claim, Placement
from vcproxy.brain.server import serve
from vcproxy.brain.store import Store
from vcproxy.model.addresses import parse_address
from vcproxy.model.tenant import SUPER_UID, Tenant, TenantModel
from vcproxy.node import service
from vcproxy.node.cache import Cache
from vcproxy.node.config import Attachment, BrainAddress, NodeConfiguration
from vcproxy.node.holdings import Held, Holdings
from vcproxy.node.service import NodeAgent
from vcproxy.ops import admin
from vcproxy.ops.configfile import ConfigError
from vcproxy.ops.events import EventRecorder
from vcproxy.ops.pki import Authority

WEB = service_port("web", "10.0.1.1")


@pytest.fixture
def config(tmp_path: Path, unused_tcp_port: int) -> NodeConfiguration:
    return NodeConfiguration(
        node_name=NODE,
        brain=BrainAddress(addresses=("127.0.0.1:1",), cert_file="/nowhere", key_file="/nowhere", ca_file="/nowhere"),
        state_directory=str(tmp_path / "state"),
        admin_socket=str(tmp_path / "node.sock"),
        metrics_address="",
        health_address=f"127.0.0.1:{unused_tcp_port}",
    )


async def remember(config: NodeConfiguration) -> None:
    holdings = Holdings()
    cache = Cache(Path(config.state_directory), node=NODE, holdings=holdings)
    holdings.put(Held(Tenant("acme", "Acme"), TenantModel([WEB]), 3, "brain-1", synced=True))
    cache.keep("acme")
    cache.keep_node(FACTS, {})
    await cache.flush()


async def test_a_node_that_starts_with_the_brain_down_forwards_what_it_had(config: NodeConfiguration) -> None:
    await remember(config)
    kernel, stop = Kernel(), asyncio.Event()
    backend = FakeBackend(kernel=kernel)
    async with asyncio.TaskGroup() as group, aiohttp.ClientSession() as client:
        running = group.create_task(NodeAgent(config, backend=backend).run(stop))
        async with asyncio.timeout(10):
            while True:
                try:
                    async with client.get(f"http://{config.health_address}/readyz") as answer:
                        if answer.status == 200:
                            break
                except aiohttp.ClientError:
                    pass
                assert not running.done()
                await asyncio.sleep(0.01)  # a socket that is not there yet has no event
        assert list(kernel.tables["acme"]) == [WEB.key]
        assert kernel.node.node_addresses == FACTS.addresses
        async with asyncio.timeout(10):
            while not Path(config.admin_socket).is_socket():  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
        status = await admin.fetch(config.admin_socket, "/status")
        assert status["role"] == "node"
        assert status["healthy"] is True
        assert status["brain"] is None
        assert [row["service"] for row in await admin.fetch(config.admin_socket, "/services", {"tenant": "Acme"})] == [
            "web"
        ]
        with pytest.raises(admin.AdminError, match="not on this node"):
            await admin.fetch(config.admin_socket, "/services", {"tenant": "nobody"})
        stop.set()
    assert list(kernel.tables["acme"]) == [WEB.key], "what was programmed stays"
    assert not Path(config.admin_socket).exists()
    assert not backend.opened


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(15):
        while not condition():  # noqa: ASYNC110 - what is awaited is in another program's hands
            await asyncio.sleep(0.01)


async def test_with_a_real_brain_over_mutual_tls(config: NodeConfiguration, tmp_path: Path) -> None:
    authority = Authority()
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    brain_files = authority.server(["127.0.0.1"]).write(tmp_path, "brain")
    node_files = authority.node(NODE).write(tmp_path, "node")
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    store, placement = Store(), Placement()
    placement.put_facts(NODE, FACTS)
    placement.move((), (Claim(NODE, parse_address("10.0.1.1"), "acme"),))
    placement.set_ready()
    store.add_tenant(Tenant("acme", "Acme"))
    store.replace("acme", [WEB])
    store.set_synced("acme")
    listen = Listen(
        address="127.0.0.1:0",
        cert_file=str(brain_files[0]),
        key_file=str(brain_files[1]),
        client_ca_file=str(tmp_path / "ca.crt"),
    )
    kernel, stop, distributor = Kernel(), asyncio.Event(), Distributor(store=store, placement=placement)
    kernel.tables["left-behind"] = {}
    tables = kernel.tables
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(serve(distributor, listen, bound=port.set_result))
        connected = msgspec.structs.replace(
            config,
            brain=BrainAddress(
                addresses=(f"127.0.0.1:{await port}",),
                cert_file=str(node_files[0]),
                key_file=str(node_files[1]),
                ca_file=str(tmp_path / "ca.crt"),
            ),
        )
        group.create_task(NodeAgent(connected, backend=FakeBackend(kernel=kernel)).run(stop))
        await until(lambda: "acme" in tables and "left-behind" not in tables)
        assert list(tables["acme"]) == [WEB.key]
        assert kernel.attachments.addresses == {parse_address("10.0.1.1"): "acme"}
        assert kernel.node.node_addresses == FACTS.addresses

        store.update("acme", [service_port("web", "10.0.1.1", "10.0.2.2")], [])
        await until(lambda: len(tables["acme"][WEB.key].cluster4) == 12)
        revision = store.tenants()["acme"].revision
        await until(lambda: [t.committed for node in distributor.nodes() for t in node.tenants] == [revision])

        store.remove_tenant("acme")
        await until(lambda: "acme" not in tables)
        stop.set()
        serving.cancel()


async def test_the_super_cluster_is_told_of_its_own_services_by_events(
    config: NodeConfiguration, unused_tcp_port_factory: Callable[[], int]
) -> None:
    """Two Services, the super cluster's and a tenant's, want health-check node ports where others listen."""
    ports = {uid: unused_tcp_port_factory() for uid in (SUPER_UID, "acme")}
    holdings = Holdings()
    cache = Cache(Path(config.state_directory), node=NODE, holdings=holdings)
    for uid, port in ports.items():
        web = msgspec.structs.replace(WEB, external_local=True, health_check_node_port=port)
        holdings.put(Held(Tenant(uid, uid), TenantModel([web]), 3, "brain-1", synced=True))
        cache.keep(uid)
    cache.keep_node(FACTS, {})
    await cache.flush()
    config = msgspec.structs.replace(config, node_port_addresses=("0.0.0.0/0",))
    stop, path = asyncio.Event(), "/apis/events.k8s.io/v1/events"
    async with AsyncExitStack() as stack:
        for port in ports.values():
            stack.enter_context(socket.create_server(("0.0.0.0", port)))
        api = await stack.enter_async_context(FakeApiServer())
        group = await stack.enter_async_context(asyncio.TaskGroup())
        agent = NodeAgent(config, backend=FakeBackend(), events=EventRecorder(lambda: api.credentials, host=NODE))
        group.create_task(agent.run(stop))
        await until(lambda: len(api.objects("Event", path=path)) == 2)
        problems = (await admin.fetch(config.admin_socket, "/status"))["problems"]
        stop.set()
    starting, failed = sorted(api.objects("Event", path=path), key=lambda event: event["type"])
    assert (starting["reason"], starting["regarding"]["kind"]) == ("Starting", "Node")
    assert (failed["reason"], failed["regarding"]["name"]) == ("FailedToStartServiceHealthcheck", "web")
    assert failed["note"] == (
        f'node {NODE} failed to start healthcheck "default/web" on port {ports[SUPER_UID]}: '
        f"listen 0.0.0.0:{ports[SUPER_UID]}: Address already in use"
    )
    assert {problem["problem"].partition(":")[0] for problem in problems} == {"tenant acme", "tenant super"}


def test_an_attachment_is_one_thing(config: NodeConfiguration) -> None:
    with pytest.raises(ConfigError, match=r"attachments\[0\]"):
        NodeAgent(NodeConfiguration(node_name=NODE, attachments=(Attachment(),)), backend=FakeBackend())


async def test_an_address_in_use_is_named(config: NodeConfiguration) -> None:
    server = await asyncio.start_server(lambda reader, writer: None, *config.health_address.split(":"))
    async with server:
        with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match=f"healthAddress {config.health_address}")):
            await NodeAgent(config, backend=FakeBackend()).run(asyncio.Event())


async def test_an_address_in_use_may_be_waited_for(
    config: NodeConfiguration, unused_tcp_port_factory: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As kube-proxy without --bind-address-hard-fail; it is how vcproxy waits for a kube-proxy to end."""
    monkeypatch.setattr(service, "BIND_AGAIN", 0.01)
    metrics_address = f"127.0.0.1:{unused_tcp_port_factory()}"
    config = msgspec.structs.replace(config, metrics_address=metrics_address, bind_hard_fail=False)
    stop = asyncio.Event()
    first = await asyncio.start_server(lambda reader, writer: writer.close(), *metrics_address.split(":"))

    async def serves(client: aiohttp.ClientSession, address: str, path: str) -> bool:
        try:
            async with client.get(f"http://{address}{path}") as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False

    async with asyncio.TaskGroup() as group, aiohttp.ClientSession() as client, asyncio.timeout(20):
        group.create_task(NodeAgent(config, backend=FakeBackend()).run(stop))
        while not await serves(client, config.health_address, "/livez"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        first.close()
        await first.wait_closed()
        while not await serves(client, metrics_address, "/metrics"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        stop.set()


@pytest.mark.parametrize(
    ("shown", "group", "kind"),
    [
        (None, "vcproxy.dev", "NodeConfiguration"),
        ({"kubeproxy.config.k8s.io": {"kind": "X"}}, "kubeproxy.config.k8s.io", "X"),
    ],
    ids=["of an agent", "of vcproxy run"],
)
async def test_configz_and_proxy_mode(
    config: NodeConfiguration, unused_tcp_port_factory: Callable[[], int], shown: Any, group: str, kind: str
) -> None:
    address, stop = f"127.0.0.1:{unused_tcp_port_factory()}", asyncio.Event()
    config = msgspec.structs.replace(config, metrics_address=address)
    async with asyncio.TaskGroup() as tasks, aiohttp.ClientSession() as client, asyncio.timeout(20):
        tasks.create_task(NodeAgent(config, backend=FakeBackend(), shown=shown).run(stop))
        while True:
            try:
                async with client.get(f"http://{address}/configz") as answer:
                    assert answer.content_type == "application/json"
                    assert (await answer.json())[group]["kind"] == kind
                async with client.get(f"http://{address}/proxyMode") as answer:
                    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
                    assert await answer.text() == "nftables"
                break
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.01)
        stop.set()
