"""Credentials that rotate while watches go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from tests.fakes.apiserver import FakeApiServer, Fault, end_of_list, event, fail
from tests.unit.brain.polling import until
from vcproxy.brain.inputs import ApiInput, RotatingClient
from vcproxy.brain.turns import Turn, Turns
from vcproxy.kube.client import Client, Limits
from vcproxy.kube.decode import SERVICES, Page
from vcproxy.kube.kubeconfig import Credentials
from vcproxy.kube.lines import Line
from vcproxy.kube.reflector import Broken, Recovered

CREDENTIALS = cast("Credentials", object())


class OneBatch:
    """A client whose watch says something once, and after that nothing, closed or not: as aiohttp's does."""

    tenant, limits = "acme", Limits()

    async def watch(self, *_: Any, **__: Any) -> AsyncGenerator[list[Line], None]:
        yield []
        yield [b"line"]
        await asyncio.Event().wait()

    async def close(self) -> None: ...


class Stream(Client):
    """A client that hears these lines, and then nothing."""

    def __init__(self, lines: list[Line]) -> None:
        self.tenant, self.limits, self._lines = "acme", Limits(), lines

    async def watch(self, *_: Any, **__: Any) -> AsyncGenerator[list[Line], None]:
        yield []
        yield self._lines
        await asyncio.Event().wait()

    async def close(self) -> None: ...


async def test_a_rotation_while_a_batch_is_worked_on_ends_the_watch_in_good_order() -> None:
    client = RotatingClient(lambda credentials: cast("Client", OneBatch()), CREDENTIALS, Turn(Turns()))
    lines = client.watch(SERVICES, resource_version="1", timeout_seconds=300)
    assert [await anext(lines), await anext(lines)] == [[], [b"line"]]
    await client.rotate(CREDENTIALS)
    async with asyncio.timeout(5):
        with pytest.raises(StopAsyncIteration):
            await anext(lines)


async def test_a_rotation_within_a_stream_that_is_a_list_begins_it_anew() -> None:
    """Later it ends the watch in good order."""
    end = end_of_list("Service", 7).strip()
    found = [event("ADDED", {"metadata": {"name": name}, "spec": {}}).strip() for name in "abc"]
    made = [Stream([found[0]]), Stream([found[1], end, found[2]]), Stream([])]
    client = RotatingClient(lambda credentials: cast("Client", made.pop(0)), CREDENTIALS, Turn(Turns()))
    steps = client.list_and_watch(SERVICES, timeout_seconds=300)
    async with asyncio.timeout(5):
        assert [await anext(steps), await anext(steps)] == [[], []]
        await client.rotate(CREDENTIALS)
        assert await anext(steps) == []
        page = await anext(steps)
        assert isinstance(page, Page) and [found.metadata.name for found in page.objects] == ["b"]
        assert await anext(steps) == [found[2]]
        await client.rotate(CREDENTIALS)
        with pytest.raises(StopAsyncIteration):
            await anext(steps)


async def test_a_server_that_is_elsewhere_ends_what_was_broken_at_the_old_place() -> None:
    async with FakeApiServer() as bad, FakeApiServer() as good, asyncio.TaskGroup() as group:
        bad.faults.append(Fault(fail(503)))
        seen: list[Any] = []
        source = ApiInput(bad.credentials, tenant="acme", resources=(SERVICES,), limits=Limits())
        task = group.create_task(source.run(lambda kind, event: seen.append(event)))
        await bad.until(lambda: any(isinstance(event, Broken) for event in seen))
        await source.rotate(good.credentials)
        await good.watching("Service")
        await until(lambda: isinstance(seen[-1], Recovered))
        task.cancel()
