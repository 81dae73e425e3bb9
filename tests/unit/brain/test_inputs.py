"""Credentials that rotate while watches go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from vcproxy.brain.inputs import RotatingClient
from vcproxy.brain.turns import Turn, Turns
from vcproxy.kube.client import Client, Limits
from vcproxy.kube.decode import SERVICES
from vcproxy.kube.kubeconfig import Credentials
from vcproxy.kube.lines import Line

CREDENTIALS = cast("Credentials", object())


class OneBatch:
    """A client whose watch says something once, and after that nothing, closed or not: as aiohttp's does."""

    tenant, limits = "acme", Limits()

    async def watch(self, *_: Any, **__: Any) -> AsyncGenerator[list[Line], None]:
        yield []
        yield [b"line"]
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
