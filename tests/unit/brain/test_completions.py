"""grpc.aio's completions: all of them in one turn of the loop, with the real library on loopback."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import uvloop

from vcproxy.brain import completions

STREAMS = 100
MESSAGES = 5


async def turns_taken() -> int:
    """How many turns of a busy loop it takes to write some messages to each of many streams that stand, and read them.

    Each message is two completions, of its writing and of its reading.
    """
    now, standing, turns = asyncio.Event(), asyncio.Semaphore(0), 0

    async def answer(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await context.write(request)
        await now.wait()
        for _ in range(MESSAGES):
            await context.write(request)

    async def ask(channel: grpc.aio.Channel) -> None:
        call = channel.unary_stream("/test.Echo/Ask")(b"x")
        assert await call.read() == b"x"
        standing.release()
        assert [await call.read() for _ in range(MESSAGES)] == [b"x"] * MESSAGES

    async def busy() -> None:
        nonlocal turns
        while True:
            turns += 1
            sum(range(100_000))  # some milliseconds
            await asyncio.sleep(0)

    server = grpc.aio.server()
    handlers = {"Ask": grpc.unary_stream_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel, asyncio.TaskGroup() as group:
        calls = [group.create_task(ask(channel)) for _ in range(STREAMS)]
        for _ in calls:
            await standing.acquire()
        loop_is_busy = group.create_task(busy())
        now.set()
        await asyncio.wait(calls)
        loop_is_busy.cancel()
    await server.stop(grace=None)
    return turns


@pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_a_busy_loop_takes_all_completions_that_wait_in_one_turn(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def main() -> int:
        completions.relieve(asyncio.get_running_loop())
        async with asyncio.timeout(60):
            return await turns_taken()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(main()) < STREAMS * MESSAGES / 2


def test_where_the_queue_is_not_emptied_the_loop_is_woken_again() -> None:
    """A completion of a loop that is closed raises, and the ones behind it must not wait for one that may never come."""
    read, write = socket.socketpair()
    fails = [True, False]

    class PollerCompletionQueue:
        def handle(self) -> None:
            read.recv(1)
            if fails.pop(0):
                raise RuntimeError("Event loop is closed")

    added: list[Any] = []

    class Loop(asyncio.SelectorEventLoop):
        def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:
            added.append(callback)

    loop = Loop()
    with read, write:
        read.setblocking(False)
        completions.relieve(loop)
        added.clear()
        loop.add_reader(read, PollerCompletionQueue().handle)
        write.send(b"123")
        with pytest.raises(RuntimeError):
            added[0]()
        assert read.recv(10, socket.MSG_PEEK) == b"23"
        added[0]()
        with pytest.raises(BlockingIOError):
            read.recv(10)
        added[0]()  # nothing there is no trouble
    loop.close()


def test_other_readers_are_left_alone() -> None:
    added: list[tuple[Any, ...]] = []

    class Loop(asyncio.SelectorEventLoop):
        def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:
            added.append((fd, callback, *args))

    loop = Loop()
    try:
        added.clear()
        completions.relieve(loop)
        loop.add_reader(7, print, "x")
    finally:
        loop.close()
    assert added == [(7, print, "x")]
