"""Peers that die without a word: the connection stands, nothing answers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from tests.unit.distribution.rig import Certificates, Placed, brain, node, until
from vcproxy.brain.distribution import Limits
from vcproxy.node.holdings import Connected, Disconnected

A = "node-a"


class Relay:
    """A TCP relay that can stop to carry anything, as a network that swallows packets does."""

    def __init__(self) -> None:
        self.address = ""
        self.carries = asyncio.Event()
        self.carries.set()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                await self.carries.wait()
                writer.write(data)
                await writer.drain()


@contextlib.asynccontextmanager
async def relay(address: str) -> AsyncIterator[Relay]:
    made = Relay()
    host, _, port = address.rpartition(":")

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, thither = await asyncio.open_connection(host, int(port))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(made.pump(reader, thither))
                group.create_task(made.pump(there, writer))
        finally:
            writer.close()
            thither.close()

    server = await asyncio.start_server(carry, "127.0.0.1", 0)
    made.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        server.close()
        made.carries.set()


async def test_a_brain_that_went_silent_is_noticed_and_another_is_asked(certificates: Certificates) -> None:
    placement = Placed({A: []})
    async with (
        brain(certificates, placement) as b,
        relay(b.address) as between,
        node(A, certificates.node(A), between.address, keepalive=1.0) as n,
    ):
        await until(lambda: n.saw(Connected))
        between.carries.clear()
        await until(lambda: n.saw(Disconnected), "the silence", seconds=15)
        between.carries.set()
        await until(lambda: len(n.saw(Connected)) == 2)


async def test_a_node_that_went_silent_is_noticed(certificates: Certificates) -> None:
    limits = Limits(keepalive=1.0, keepalive_timeout=1.0)
    async with (
        brain(certificates, Placed({A: []}), limits=limits) as b,
        relay(b.address) as between,
        node(A, certificates.node(A), between.address, keepalive=600) as n,
    ):
        await until(lambda: n.saw(Connected))
        between.carries.clear()
        await until(lambda: not b.distributor.nodes(), "the silence", seconds=15)
