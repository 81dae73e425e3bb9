"""The floor of a change told to many nodes: the same octets written to as many TLS connections, and nothing thought.

`python -m benchmarks.brain.floor DIRECTORY OCTETS` says its port, and writes to all who are connected for each line on
standard input; the answer is when it began.
"""

import asyncio
import json
import ssl
import sys
import time
from pathlib import Path
from typing import cast

import uvloop


class _Writer(asyncio.Protocol):
    def __init__(self, connected: list[asyncio.Transport]) -> None:
        self._connected = connected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._connected.append(cast("asyncio.Transport", transport))


async def main(directory: Path, octets: int) -> None:
    """Serve until standard input ends."""
    loop = asyncio.get_running_loop()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "brain.crt", directory / "brain.key")
    context.load_verify_locations(directory / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    connected: list[asyncio.Transport] = []
    server = await loop.create_server(lambda: _Writer(connected), "127.0.0.1", 0, ssl=context)
    print(json.dumps(server.sockets[0].getsockname()[1]), flush=True)
    orders, message = asyncio.StreamReader(), bytes(octets)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while await orders.readline():
        began = time.time()
        for transport in connected:
            transport.write(message)
        print(json.dumps(began), flush=True)


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1]), int(sys.argv[2])))
