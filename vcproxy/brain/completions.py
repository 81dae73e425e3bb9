"""grpc.aio's completions, taken as they come and not one a turn of the loop.

A thread of grpc.aio (1.85, completion_queue.pyx) queues each completed operation and writes an octet to a socket pair;
the loop's reader of it takes everything from the queue, but only one octet. The octets that are left cost a turn of the
loop each. When the loop is busy, some 280 of them fill the pair, the thread waits in write(2), and from then on there
is one completion a turn: a brain whose turns took 5 ms (one tenant wrote as fast as it could) told nodes of other
tenants' changes 200 ms late, for as long as that went on.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

_QUEUE = "PollerCompletionQueue"
_AT_ONCE = 4096  # octets; the pair does not hold so many


def relieve(loop: asyncio.AbstractEventLoop) -> None:
    """From now on readers of completions that are added to `loop` take all octets at once; others are as they were.

    Call before grpc.aio is first used in this loop.
    """
    add = loop.add_reader

    def add_reader(fd: Any, callback: Callable[..., object], *args: Any) -> None:
        bound = getattr(callback, "func", callback)  # a partial with the loop
        if isinstance(fd, socket.socket) and type(getattr(bound, "__self__", None)).__name__ == _QUEUE:
            callback = _Drained(fd, callback)
        add(fd, callback, *args)

    loop.add_reader = add_reader  # type: ignore[method-assign, assignment]


class _Drained:
    """Calls `taken`, which takes one octet of `pair` and empties the queue, and then takes the octets that were there.

    None of a later operation: that may have come too late for this time. And none if `taken` raises (an operation of a
    loop that is closed): it has stopped half-way, and goes on where an octet is left.
    """

    def __init__(self, pair: socket.socket, taken: Callable[..., object]) -> None:
        self._pair, self._taken = pair, taken

    def __call__(self) -> None:
        try:
            octets = len(self._pair.recv(_AT_ONCE, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return  # it would block in its own recv
        self._taken()
        if octets > 1:
            self._pair.recv(octets - 1)
