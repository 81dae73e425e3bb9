"""The floors of a change told to many nodes: the same octets to as many peers, and nothing thought.

`python -m benchmarks.brain.floor DIRECTORY OCTETS tls|grpc` says its port, and writes to all who are connected for each
line on standard input; the answer is when it began. To plain TLS connections: what the kernel, OpenSSL and the event
loop take. By gRPC to calls of Watch: what grpc.aio takes, too.
"""

import asyncio
import json
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import grpc
import uvloop

from vcproxy.pb.distribution_pb2 import BrainMessage, Synced, TenantsComplete

Tell = Callable[[], None]


async def tls(directory: Path, message: bytes) -> tuple[int, Tell, object]:
    """Serve plain connections; returns the port, what writes to all, and the server, which lives while it is held."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "brain.crt", directory / "brain.key")
    context.load_verify_locations(directory / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    connected: list[asyncio.Transport] = []

    class Writer(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            connected.append(cast("asyncio.Transport", transport))

    def tell() -> None:
        for transport in connected:
            transport.write(message)

    server = await asyncio.get_running_loop().create_server(Writer, "127.0.0.1", 0, ssl=context)
    return server.sockets[0].getsockname()[1], tell, server


async def by_grpc(directory: Path, message: bytes) -> tuple[int, Tell, object]:
    """Serve calls; as `tls`."""
    events: list[asyncio.Event] = []

    async def watch(requests: AsyncIterator[bytes], context: Any) -> None:
        await anext(requests)
        for said in (BrainMessage(synced=Synced(tenant="t")), BrainMessage(complete=TenantsComplete(tenants=["t"]))):
            await context.write(said.SerializeToString())
        told = asyncio.Event()
        events.append(told)
        while True:
            await told.wait()
            told.clear()
            await context.write(message)

    def tell() -> None:
        for told in events:
            told.set()

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(watch)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("vcproxy.v1.Distribution", {"Watch": handler}),)
    )
    key, certificate, authority = (directory / name for name in ("brain.key", "brain.crt", "ca.crt"))
    credentials = grpc.ssl_server_credentials(
        [(key.read_bytes(), certificate.read_bytes())], authority.read_bytes(), require_client_auth=True
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    return port, tell, server


async def main(directory: Path, octets: int, how: str) -> None:
    """Serve until standard input ends."""
    delta = BrainMessage()
    delta.delta.tenant = "x" * max(0, octets - 4)
    port, tell, _server = await (tls if how == "tls" else by_grpc)(directory, delta.SerializeToString())
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    print(json.dumps(port), flush=True)
    while await orders.readline():
        began = time.time()
        tell()
        print(json.dumps(began), flush=True)


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
