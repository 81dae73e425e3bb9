"""An API server of this machine's loopback, on the loopback of a network namespace.

A proxy under test lives in a node's namespace and has to reach the API server with a plain kubeconfig. A veth to the
machine's own network would do, but then tests would touch that network; so bytes are carried by a thread instead, which
owns sockets on both sides. TLS goes through untouched.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from types import TracebackType
from typing import Self

from vcproxy.lab import netns


class Relay:
    """127.0.0.1:PORT in a namespace is 127.0.0.1:PORT of this process's, while the context is open."""

    def __init__(self, ns: str, port: int) -> None:
        self._port = port
        self._flows = asyncio.Event()
        self._flows.set()
        self._cut = False
        self._listener = netns.socket_in(ns, socket.AF_INET, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", port))
        self._listener.listen()
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def freeze(self) -> None:
        """From now on nothing is carried, and nobody is told: connections stand, and new ones are accepted."""
        self._gate(open=False)

    def thaw(self) -> None:
        """What was sent meanwhile arrives, and all goes on."""
        self._gate(open=True)

    def cut(self) -> None:
        """From now on every connection is reset, those that stand too."""
        self._loop.call_soon_threadsafe(self._sever)

    def mend(self) -> None:
        """Connections can be made again."""
        self._cut = False

    def _sever(self) -> None:
        self._cut = True
        for writer in self._writers:
            writer.transport.abort()

    def _gate(self, *, open: bool) -> None:
        async def turn() -> None:
            (self._flows.set if open else self._flows.clear)()

        asyncio.run_coroutine_threadsafe(turn(), self._loop).result()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._carry, sock=self._listener)

    async def _end(self) -> None:
        self._server.close()
        self._flows.set()
        mine = asyncio.current_task()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*(task for task in asyncio.all_tasks() if task is not mine), return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._cut:
                raise ConnectionResetError
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:  # the API server is down: so is its relay
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer))
                group.create_task(self._pump(far_reader, writer))
        except* OSError:
            pass
        finally:
            self._writers -= {writer, far_writer}
            writer.close()
            far_writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._flows.wait()
            writer.write(data)
            await writer.drain()
        writer.close()
