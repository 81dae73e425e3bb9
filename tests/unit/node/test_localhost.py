"""NodePorts on loopback: what is listened on follows what the backend has programmed."""

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

import pytest

from tests.fakes.backend import FakeBackend
from vcproxy.backend.protocol import TenantUpdate
from vcproxy.model.addresses import parse_address
from vcproxy.model.forwarding import Action, ForwardedFrontend, ForwardedPort, Masquerade
from vcproxy.model.services import FrontendKind, PortKey, Protocol
from vcproxy.node.localhost import LOOPBACK, Listener, LocalhostNodePorts, Pool, pools

NODE_PORT = FrontendKind.NODE_PORT
ANY = {4: bytes(4), 6: bytes(16)}


def target(address: str, port: int) -> bytes:
    return parse_address(address) + port.to_bytes(2, "big")


def forwarded(
    node_port: int, *targets: bytes, name: str = "web", protocol: Protocol = Protocol.TCP,
    outside: Action = Action.CLUSTER, local: bytes = b"", kind: FrontendKind = NODE_PORT, seconds: int = 0,
) -> ForwardedPort:  # fmt: skip
    packed = {width: b"".join(sorted(found for found in targets if len(found) == width)) for width in (6, 18)}
    return ForwardedPort(
        PortKey("default", name, "", protocol),
        tuple(
            ForwardedFrontend(kind, ANY[family], node_port, Action.CLUSTER, outside, Masquerade.ALWAYS)
            for family in (4, 6)
        ),
        cluster4=packed[6],
        cluster6=packed[18],
        local4=local,
        affinity_seconds=seconds,
    )


FOUR, OTHER, SIX = target("10.0.0.1", 80), target("10.0.0.2", 80), target("fd00::1", 80)


@pytest.mark.parametrize(
    ("port", "families", "places"),
    [
        (forwarded(30000, FOUR, SIX), (4, 6), {(4, 30000): FOUR, (6, 30000): SIX}),
        (forwarded(30000, FOUR, SIX), (4,), {(4, 30000): FOUR}),
        (forwarded(30000, FOUR), (4, 6), {(4, 30000): FOUR}),
        # Policy Local: endpoints of this node, as for a client outside.
        (forwarded(30000, FOUR, OTHER, outside=Action.LOCAL, local=OTHER), (4,), {(4, 30000): OTHER}),
        (forwarded(30000, FOUR, outside=Action.DROP), (4,), {}),
        (forwarded(30000, outside=Action.REJECT), (4,), {}),
        (forwarded(30000, FOUR, protocol=Protocol.UDP), (4,), {}),
        (forwarded(30000, FOUR, kind=FrontendKind.EXTERNAL_IP), (4,), {}),
    ],
    ids=["both families", "one asked for", "one there", "Local", "Local, none here", "none", "UDP", "no NodePort"],
)
def test_what_is_listened_on(port: ForwardedPort, families: tuple[int, ...], places: dict[object, bytes]) -> None:
    assert {place: pool.targets for place, pool in pools(port, families).items()} == places


def test_session_affinity_keeps_all_clients_together_until_it_ends() -> None:
    now = [0.0]
    listener = Listener(4, Pool(b"".join(target(f"10.0.0.{n}", 80) for n in range(1, 100)), 10), lambda: now[0])
    first = listener.choose()
    for _ in range(20):
        now[0] += 9
        assert listener.choose() == first
    listener.pool = Pool(target("10.0.1.1", 80), 10)
    assert listener.choose() == ("10.0.1.1", 80)
    listener.pool = Pool(b"".join(target(f"10.0.0.{n}", 80) for n in range(1, 100)), 0)
    assert len({listener.choose() for _ in range(50)}) > 1


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def accepts(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex((LOOPBACK[4], port)) == 0


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind((LOOPBACK[4], 0))
        port: int = taken.getsockname()[1]
        return port


async def test_relays_follow_the_backend() -> None:
    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read()).upper())  # all of it: answers a half-closed connection
        writer.close()

    server = await asyncio.start_server(shout, LOOPBACK[4], 0)
    endpoint = target(LOOPBACK[4], server.sockets[0].getsockname()[1])
    port, second = free_port(), free_port()
    ports = LocalhostNodePorts((4,))
    backend = ports.watch(FakeBackend())
    async with asyncio.TaskGroup() as group, AsyncExitStack() as stack:
        worker = stack.enter_context(ThreadPoolExecutor(1))  # the backend's own thread

        async def call(function: Callable[..., object], *arguments: object) -> None:
            await asyncio.get_running_loop().run_in_executor(worker, function, *arguments)

        await call(backend.open)
        await call(backend.apply, TenantUpdate("super", put=(forwarded(port, endpoint),), complete=True))
        running = group.create_task(ports.run())
        await until(lambda: accepts(port))
        reader, writer = await asyncio.open_connection(LOOPBACK[4], port)
        writer.write(b"hello")
        writer.write_eof()
        assert await reader.read() == b"HELLO"
        writer.close()

        # Another service comes; the first one goes.
        added = TenantUpdate("super", put=(forwarded(second, endpoint, name="other"),))
        await call(backend.apply, added)
        await until(lambda: accepts(second))
        held, holder = await asyncio.open_connection(LOOPBACK[4], port)
        removed = TenantUpdate("super", removed=(PortKey("default", "web", "", Protocol.TCP),))
        await call(backend.apply, removed)
        await until(lambda: not accepts(port))
        async with asyncio.timeout(10):
            assert await held.read() == b""  # its connections end with it
        holder.close()
        assert accepts(second)

        await call(backend.remove_tenant, "super")
        await until(lambda: not accepts(second))
        running.cancel()
    server.close()


async def test_a_port_that_is_taken_does_not_stop_others() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK[4], 0))
        taken.listen()
        ports = LocalhostNodePorts((4,))
        backend = ports.watch(FakeBackend())
        backend.open()
        free = free_port()
        put = (forwarded(taken.getsockname()[1], FOUR), forwarded(free, FOUR, name="other"))
        backend.apply(TenantUpdate("super", put=put, complete=True))
        async with asyncio.TaskGroup() as group:
            running = group.create_task(ports.run())
            await until(lambda: accepts(free))
            running.cancel()


async def test_loopback_is_no_tenants() -> None:
    tenants, supers = free_port(), free_port()
    ports = LocalhostNodePorts((4,))
    backend = ports.watch(FakeBackend())
    backend.open()
    backend.apply(TenantUpdate("acme", put=(forwarded(tenants, FOUR),), complete=True))
    backend.apply(TenantUpdate("super", put=(forwarded(supers, FOUR),), complete=True))
    backend.remove_tenant("acme")
    async with asyncio.TaskGroup() as group:
        running = group.create_task(ports.run())
        await until(lambda: accepts(supers))
        assert not accepts(tenants)
        running.cancel()
