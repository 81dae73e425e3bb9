"""Health-check node ports over real sockets on loopback; the cases of kube-proxy's TestServer and what it lacks."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from tests.unit.node.test_localpolicy import HERE, port, ready, terminating
from vcproxy.model.addresses import parse_address
from vcproxy.model.services import ServicePort
from vcproxy.node import servicehealth
from vcproxy.node.localpolicy import LocalPorts, ServiceId, local_ports
from vcproxy.node.servicehealth import HealthCheckNodePorts, Limits

LOOPBACK = (parse_address("127.0.0.1"), parse_address("::1"))
ONE, TWO = ("10.1.0.1", ready, HERE), ("10.1.0.2", ready, HERE)
LEAVING = ("10.1.0.1", terminating, HERE)
WEB = ServiceId("super", "default", "web")

BODY = """{
	"service": {
		"namespace": "default",
		"name": "web"
	},
	"localEndpoints": %d,
	"serviceProxyHealthy": %s
}"""


class Rig:
    """Running health-check node ports. `reports`: what was reported."""

    def __init__(self, **options: Any) -> None:
        self.local = LocalPorts()
        self.local.accept_on(LOOPBACK)
        self.healthy = True
        self.reports: list[tuple[ServiceId, int, str]] = []
        self.checks = HealthCheckNodePorts(
            self.local,
            healthy=lambda: self.healthy,
            report=lambda service, port, reason: self.reports.append((service, port, reason)),
            **options,
        )

    def put(self, *ports: ServicePort, tenant: str = "super") -> None:
        """The tenant has these ports now, and no others."""
        self.local.update(tenant, local_ports(ports, HERE))

    async def ask(self, number: int, host: str = "127.0.0.1", method: str = "GET", path: str = "/") -> Any:
        """(status, headers, body); None: nobody listens."""
        url = f"http://{f'[{host}]' if ':' in host else host}:{number}{path}"
        try:
            async with self.session.request(method, url) as answer:
                return answer.status, answer.headers, await answer.text()
        except aiohttp.ClientConnectorError:
            return None

    async def status(self, number: int, host: str = "127.0.0.1") -> int | None:
        answer = await self.ask(number, host)
        return answer and answer[0]

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - a listener that opens has no event
                await asyncio.sleep(0.005)

    async def becomes(self, number: int, status: int | None, host: str = "127.0.0.1") -> None:
        async with asyncio.timeout(10):
            while await self.status(number, host) != status:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.005)


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[Rig]:
    rig = Rig(**options)
    async with asyncio.TaskGroup() as group, aiohttp.ClientSession() as rig.session:
        task = group.create_task(rig.checks.run())
        try:
            yield rig
        finally:
            task.cancel()


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running() as made:
        yield made


@pytest.mark.parametrize(
    ("endpoints", "healthy", "status", "count"),
    [
        ([ONE], True, 200, 1),
        ([ONE, TWO], True, 200, 2),
        ([], True, 503, 0),
        ([LEAVING], True, 503, 0),
        ([LEAVING, TWO], True, 200, 1),
        ([ONE, TWO], False, 503, 2),
        ([], False, 503, 0),
    ],
)
async def test_the_answer(
    rig: Rig, unused_tcp_port: int, endpoints: list[Any], healthy: bool, status: int, count: int
) -> None:
    rig.put(port(*endpoints, health=unused_tcp_port))
    await rig.until(lambda: rig.checks.count == 1)
    rig.healthy = healthy
    for method, path in (("GET", "/"), ("GET", "/healthz?x"), ("POST", "/any/thing")):
        said, headers, body = await rig.ask(unused_tcp_port, method=method, path=path)
        assert said == status
        assert body == BODY % (count, "true" if healthy else "false")
        assert headers["Content-Type"] == "application/json"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Load-Balancing-Endpoint-Weight"] == str(count)


async def test_endpoints_change_under_a_listener_that_stays(rig: Rig, unused_tcp_port: int) -> None:
    rig.put(port(ONE, health=unused_tcp_port))
    await rig.until(lambda: rig.checks.count == 1)
    reader, writer = await asyncio.open_connection("127.0.0.1", unused_tcp_port)
    rig.put(port(health=unused_tcp_port), port(TWO, name="admin", health=unused_tcp_port))
    rig.put(port(ONE, TWO, health=unused_tcp_port))
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = (await reader.read()).decode()  # ends: one request a connection
    writer.close()
    assert answer.startswith("HTTP/1.1 200 ")
    assert answer.endswith(BODY % (2, "true"))


async def test_services_come_change_and_go(rig: Rig, unused_tcp_port_factory: Callable[[], int]) -> None:
    first, second = unused_tcp_port_factory(), unused_tcp_port_factory()
    assert await rig.status(first) is None
    rig.put(port(ONE, health=first))
    await rig.becomes(first, 200)
    rig.put(port(ONE, health=second))
    await rig.becomes(second, 200)
    assert await rig.status(first) is None
    rig.put(port(ONE, health=0))  # externalTrafficPolicy: Cluster
    await rig.becomes(second, None)
    rig.put(port(ONE, health=first), port(ONE, service="else", health=second))
    await rig.becomes(second, 200)
    rig.put(port(ONE, health=second), port(ONE, service="else", health=first))  # they change places
    await rig.until(lambda: rig.local.checks[WEB].port == second)
    await rig.becomes(second, 200)
    assert '"name": "web"' in (await rig.ask(second))[2]
    await rig.becomes(first, 200)
    rig.local.forget("super")
    await rig.becomes(first, None)
    assert rig.checks.count == 0
    assert rig.reports == []


async def test_each_family_of_the_service_has_a_listener_of_its_own(rig: Rig, unused_tcp_port: int) -> None:
    rig.put(port(ONE, health=unused_tcp_port))
    await rig.becomes(unused_tcp_port, 200)
    assert await rig.status(unused_tcp_port, "::1") is None, "the Service has no IPv6 address"
    rig.put(port(ONE, families=(4, 6), health=unused_tcp_port))
    await rig.becomes(unused_tcp_port, 503, "::1")
    rig.put(port(("fd00:1::1", ready, HERE), families=(6,), health=unused_tcp_port))
    await rig.becomes(unused_tcp_port, 200, "::1")
    await rig.becomes(unused_tcp_port, None)


async def test_node_port_addresses_are_followed(rig: Rig, unused_tcp_port: int) -> None:
    rig.put(port(ONE, health=unused_tcp_port))
    await rig.becomes(unused_tcp_port, 200)
    rig.local.accept_on((parse_address("127.0.0.2"),))
    await rig.becomes(unused_tcp_port, 200, "127.0.0.2")
    assert await rig.status(unused_tcp_port) is None
    rig.local.accept_on((bytes(4), bytes(16)))  # all of them
    await rig.becomes(unused_tcp_port, 200)
    assert await rig.status(unused_tcp_port, "127.0.0.2") == 200
    assert rig.checks.count == 1


def occupied(number: int, address: str = "127.0.0.1") -> socket.socket:
    other = socket.create_server((address, number))
    assert other.getsockname()[1] == number
    return other


async def test_a_listen_failure_is_told_once_others_go_on_and_it_is_tried_again(
    unused_tcp_port_factory: Callable[[], int],
) -> None:
    taken, free = unused_tcp_port_factory(), unused_tcp_port_factory()
    async with running(retry=0.02) as rig:
        with occupied(taken):
            rig.put(port(ONE, health=taken), port(ONE, service="else", health=free))
            await rig.becomes(free, 200)
            await rig.until(lambda: rig.reports)
            assert rig.reports == [(WEB, taken, f"listen 127.0.0.1:{taken}: Address already in use")]
            (problem,) = rig.checks.problems()
            assert problem.startswith(f"tenant super: Service default/web: health-check node port {taken}: listen 127")
            assert problem.endswith("free the port, or give the Service another healthCheckNodePort")
            for _ in range(5):  # further tries are not told anew
                await rig.becomes(free, 200)
        await rig.becomes(taken, 200)
        assert rig.checks.problems() == []
        assert len(rig.reports) == 1


async def test_all_addresses_of_a_service_or_none(unused_tcp_port: int) -> None:
    async with running(retry=0.02) as rig:
        rig.local.accept_on((parse_address("127.0.0.1"), parse_address("127.0.0.2")))
        with occupied(unused_tcp_port, "127.0.0.2"):
            rig.put(port(ONE, health=unused_tcp_port))
            await rig.until(lambda: rig.reports)
            assert await rig.status(unused_tcp_port) is None
            assert rig.checks.count == 0
        await rig.becomes(unused_tcp_port, 200)
        await rig.becomes(unused_tcp_port, 200, "127.0.0.2")


async def test_what_another_tenant_let_go_is_taken(unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servicehealth, "FREED_SECONDS", 0.01)
    async with running(retry=3600) as rig:
        rig.put(port(ONE, health=unused_tcp_port), tenant="acme")
        await rig.becomes(unused_tcp_port, 200)
        rig.put(port(health=unused_tcp_port), tenant="globex")
        await rig.until(rig.checks.problems)
        assert await rig.status(unused_tcp_port) == 200, "who has it keeps it"
        rig.local.forget("acme")
        await rig.becomes(unused_tcp_port, 503)
        assert rig.checks.problems() == []


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(tenant=2), "this tenant may have 2 listeners"),
        (Limits(tenants=2), "all tenants together may have 2 listeners"),
        (Limits(sockets=2), "a node may have 2 listeners"),
    ],
)
async def test_limits(unused_tcp_port_factory: Callable[[], int], limits: Limits, reason: str) -> None:
    ports = [unused_tcp_port_factory() for _ in range(4)]
    async with running(limits=limits) as rig:
        rig.put(*(port(ONE, service=f"web-{at}", health=number) for at, number in enumerate(ports[:3])), tenant="acme")
        await rig.until(lambda: rig.reports)
        assert [await rig.status(number) for number in ports[:3]] == [200, 200, None]
        assert rig.reports == [(ServiceId("acme", "default", "web-2"), ports[2], reason)]
        rig.put(port(ONE, health=ports[3]))
        if limits.sockets > 2:
            await rig.becomes(ports[3], 200)  # no tenant can take away what is the super cluster's


async def test_a_tenant_cannot_fill_the_log_or_the_status() -> None:
    async with running(limits=Limits(tenant=0)) as rig:
        rig.put(*(port(service=f"web-{number}") for number in range(200)), tenant="acme")
        await rig.until(rig.checks.problems)
        await rig.until(lambda: rig.checks.problems()[-1] == "190 more health-check node ports of tenant acme")
        assert len(rig.checks.problems()) == 11
        assert len(rig.reports) == servicehealth.TOLD


async def test_connections_that_are_held_keep_nobody_from_being_answered(unused_tcp_port: int) -> None:
    async with running(limits=Limits(connections=8)) as rig:
        rig.put(port(ONE, health=unused_tcp_port))
        await rig.until(lambda: rig.checks.count == 1)
        held = [await asyncio.open_connection("127.0.0.1", unused_tcp_port) for _ in range(20)]
        assert await rig.status(unused_tcp_port) == 200
        async with asyncio.timeout(10):
            for reader, _ in held[:12]:
                try:
                    assert await reader.read() == b"", "the oldest are cut off"
                except ConnectionResetError:
                    pass
        for _, writer in held:
            writer.close()


async def test_a_connection_without_a_request_ends(unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servicehealth, "CONNECTION_SECONDS", 0.01)
    async with running() as rig:
        rig.put(port(ONE, health=unused_tcp_port))
        await rig.until(lambda: rig.checks.count == 1)
        reader, writer = await asyncio.open_connection("127.0.0.1", unused_tcp_port)
        writer.write(b"GET / HT")
        async with asyncio.timeout(10):
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
        writer.close()


async def test_nobody_listens_when_it_has_ended(unused_tcp_port: int) -> None:
    async with running() as rig:
        rig.put(port(ONE, health=unused_tcp_port))
        await rig.becomes(unused_tcp_port, 200)
    with occupied(unused_tcp_port):
        rig.put(port(ONE, health=unused_tcp_port))  # and nobody minds what comes later
    assert rig.checks.count == 0


def test_limits_leave_descriptors_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now = (1024, 4096)
    monkeypatch.setattr(servicehealth.resource, "getrlimit", lambda _: now)
    monkeypatch.setattr(servicehealth.resource, "setrlimit", lambda _, wanted: asked.append(wanted))
    asked: list[tuple[int, int]] = []
    assert servicehealth.socket_limits() == Limits(tenant=128, tenants=512, sockets=2048, connections=512)
    assert asked == [(4096, 4096)]
    now, asked = (256, 256), []
    assert servicehealth.socket_limits() == Limits(tenant=32, tenants=32, sockets=128, connections=64)
    now = (1 << 20, 1 << 20)
    assert servicehealth.socket_limits() == Limits()
    assert asked == []
