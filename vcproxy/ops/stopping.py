"""How a daemon ends: SIGTERM and SIGINT set an event, the event ends the task group, nothing is undone.

The daemons of one process share one event: two handlers for the same signal would leave one of them running.
"""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class _Stopped(Exception):
    """The process was asked to end."""


@contextlib.contextmanager
def signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set while the context is open."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    both = (signal.SIGTERM, signal.SIGINT)
    for number in both:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in both:
            loop.remove_signal_handler(number)


async def until_stopped(serve: Callable[[], Coroutine[Any, Any, None]], stop: asyncio.Event | None = None) -> None:
    """Serve until SIGTERM or SIGINT, or until `stop` is set (then signals are the caller's).

    What `serve` raises comes in an exception group.
    """
    with signals() if stop is None else contextlib.nullcontext(stop) as asked:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_end(asked))
                group.create_task(serve())
        except* _Stopped:
            pass


async def heeded(work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, which has a TaskGroup whose failure its caller survives, and never lose a cancellation in it.

    A group that waits for its tasks because one of them, or its body, has failed drops a cancellation that comes just
    then, and raises the failure alone (CPython before 3.13). The caller would catch that and go on, deaf to SIGTERM. In
    its own task the group may confuse its own count of cancellations, and only real ones are counted here.
    """
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        return await asyncio.get_running_loop().create_task(work)
    except BaseException:
        if task.cancelling() > before:
            raise asyncio.CancelledError from None
        raise


async def _end(stop: asyncio.Event) -> None:
    await stop.wait()
    raise _Stopped
