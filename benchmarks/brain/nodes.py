"""Readers of the brain's streams, in one process: `python -m benchmarks.brain.nodes DIRECTORY`.

Orders come by standard input, one line each; what was seen is answered on standard output:

    connect PORT COUNT ACKNOWLEDGE  so many nodes; answered when each has been told all it is to know
    forget                          what was seen so far
    seen                            of each delta since: tenant, when it was sent, read, compiled, and when it came
    raw PORT COUNT OCTETS           the floor: readers of plain TLS connections, that expect messages of this size

Times are seconds on the machine's clock, which all processes share. A delta is dated by the event in it that was sent
first.
"""

import asyncio
import json
import ssl
import sys
import time
from pathlib import Path

import uvloop

from benchmarks.brain.http2 import Call
from vcproxy.lab.cluster import BRAIN_NAME
from vcproxy.pb import features
from vcproxy.pb.distribution_pb2 import COMMITTED, Ack, BrainMessage, Delta, Hello, NodeMessage


class Node:
    """One node's stream."""

    def __init__(self, name: str, nodes: "Nodes") -> None:
        self._nodes = nodes
        self._synced: set[str] = set()
        self._wanted: frozenset[str] | None = None
        self.ready = asyncio.Event()
        hello = NodeMessage(hello=Hello(node=name, agent="benchmark", features=[features.BATCH]))
        self.call = Call(hello.SerializeToString(), self.said)

    def said(self, call: Call, raw: memoryview) -> None:
        """A message of the brain."""
        now = time.time()
        message = BrainMessage.FromString(raw)
        for each in message.batch.messages if message.HasField("batch") else (message,):
            self._act(each, now)
        if self._wanted is not None and self._synced >= self._wanted:
            self.ready.set()

    def _act(self, message: BrainMessage, now: float) -> None:
        match message.WhichOneof("message"):
            case "delta":
                self._nodes.deltas.append((now, message.delta))
                if self._nodes.acknowledge:
                    self._acknowledge(message.delta)
            case "synced":
                self._synced.add(message.synced.tenant)
            case "complete":
                self._wanted = frozenset(message.complete.tenants)

    def _acknowledge(self, delta: Delta) -> None:
        ack = Ack(tenant=delta.tenant, revision=delta.to, digest=delta.digest, stage=COMMITTED, microseconds=100)
        self.call.send(NodeMessage(ack=ack).SerializeToString())


class Nodes:
    """All of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.deltas: list[tuple[float, Delta]] = []
        self.acknowledge = False
        self._calls: list[Call] = []
        self._raw: list[_Raw] = []

    async def connect(self, port: int, count: int, acknowledge: bool) -> object:
        """Open so many streams in place of those there are."""
        for call in self._calls:
            call.close()
        self.acknowledge = acknowledge
        nodes = [Node(f"node-{number}", self) for number in range(count)]
        self._calls = [node.call for node in nodes]
        loop = asyncio.get_running_loop()
        for number, node in enumerate(nodes):
            context = ssl.create_default_context(cafile=str(self._directory / "ca.crt"))
            context.load_cert_chain(self._directory / f"node-{number}.crt", self._directory / f"node-{number}.key")
            context.set_alpn_protocols(["h2"])
            await loop.create_connection(
                lambda node=node: node.call, "127.0.0.1", port, ssl=context, server_hostname=BRAIN_NAME
            )
        for node in nodes:
            await node.ready.wait()
        return {}

    def seen(self) -> object:
        """The deltas since the last time, and how large their messages are."""
        deltas, self.deltas = self.deltas, []
        timings = [
            (d.tenant, d.timing.event / 1e9, d.timing.received / 1e9, d.timing.compiled / 1e9, now) for now, d in deltas
        ]
        return {"octets": deltas[-1][1].ByteSize() if deltas else 0, "deltas": timings}

    async def raw(self, port: int, count: int, octets: int) -> object:
        """Connect to the floor."""
        loop = asyncio.get_running_loop()
        self._raw = [_Raw(octets, self) for _ in range(count)]
        for reader in self._raw:
            context = ssl.create_default_context(cafile=str(self._directory / "ca.crt"))
            context.load_cert_chain(self._directory / "node-0.crt", self._directory / "node-0.key")
            await loop.create_connection(
                lambda reader=reader: reader, "127.0.0.1", port, ssl=context, server_hostname=BRAIN_NAME
            )
        return {}


class _Raw(asyncio.Protocol):
    """Counts messages of one size."""

    def __init__(self, octets: int, nodes: Nodes) -> None:
        self._octets, self._nodes, self._received = octets, nodes, 0

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        while self._received >= self._octets:
            self._received -= self._octets
            self._nodes.deltas.append((time.time(), Delta()))


async def main(directory: Path) -> None:
    """Do as told."""
    asyncio.get_running_loop().set_exception_handler(_fail)
    nodes, orders = Nodes(directory), asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while order := (await orders.readline()).split():
        said: object = {}
        match order[0], [int(number) for number in order[1:]]:
            case b"connect", [port, count, acknowledge]:
                said = await nodes.connect(port, count, bool(acknowledge))
            case b"raw", [port, count, octets]:
                said = await nodes.raw(port, count, octets)
            case b"forget", []:
                nodes.deltas.clear()
            case b"seen", []:
                said = nodes.seen()
        print(json.dumps(said), flush=True)


def _fail(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    loop.default_exception_handler(context)
    loop.stop()


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1])))
