"""Brain and node in one process: the same messages, over two queues of one place each instead of gRPC.

A place is the flow control of a stream: the brain makes its next message when the node has taken the last one.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from vcproxy.brain.distribution import Distributor, Refused
from vcproxy.node.session import Connect, Link, StreamEnded
from vcproxy.ops import logs

_log = logs.get("run")


class _Link:
    """The node's end. What comes down is a message, or why there is no more."""

    def __init__(self) -> None:
        self.up: asyncio.Queue[bytes] = asyncio.Queue(1)
        self.down: asyncio.Queue[bytes | StreamEnded] = asyncio.Queue(1)

    async def read(self) -> bytes:
        found = await self.down.get()
        if isinstance(found, StreamEnded):
            raise found
        return found

    async def write(self, data: bytes) -> None:
        await self.up.put(data)

    async def requests(self) -> AsyncIterator[bytes]:
        """The brain's end of what goes up."""
        while True:
            yield await self.up.get()


def connect(distributor: Distributor, node: str) -> Connect:
    """The way of that node to the brain whose distributor this is."""

    async def attend(link: _Link) -> None:
        try:
            await distributor.attend(node, "in-process", link.requests(), link.down.put)
            ended = StreamEnded("the brain ended the stream")
        except Refused as refused:
            _log.warning("stream refused", code=refused.code, reason=refused.problem)
            ended = StreamEnded(f"{refused.code}: {refused.problem}")
        except Exception as error:  # as gRPC: what fails on one stream is over with it
            _log.exception("a stream ended with an internal error")
            ended = StreamEnded(f"UNKNOWN: {error}")
        await link.down.put(ended)

    @contextlib.asynccontextmanager
    async def connected(address: str, host: str) -> AsyncIterator[Link]:
        del address, host
        link = _Link()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(attend(link))
            try:
                yield link
            finally:
                task.cancel()

    return connected
