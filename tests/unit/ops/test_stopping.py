"""A daemon ends when it is asked to, also at the moment when something of it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.apiserver import FakeApiServer
from vcproxy.brain.config import SuperCluster
from vcproxy.brain.feed import Feed
from vcproxy.brain.guard import UNRESTRICTED
from vcproxy.brain.inputs import ApiInput
from vcproxy.brain.sources.attribution import Owners
from vcproxy.brain.sources.catalogue import PROJECTS
from vcproxy.brain.sources.hosted import HostedTenants
from vcproxy.brain.store import Store
from vcproxy.brain.superaccess import SuperAccess
from vcproxy.kube.client import Limits
from vcproxy.model.tenant import Tenant
from vcproxy.node.config import BrainAddress
from vcproxy.node.dialling import Dialler
from vcproxy.node.holdings import Holdings
from vcproxy.node.session import Session, StreamEnded


class Slow:
    """A task that takes a moment to end."""

    def __init__(self) -> None:
        self.ending = asyncio.Event()
        self.release = asyncio.Event()
        self.begun: Callable[[], None] = lambda: None

    async def run(self, *ignored: object) -> None:
        self.begun()
        try:
            await asyncio.Event().wait()
        finally:
            self.ending.set()
            await self.release.wait()

    async def beside(self, failing: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """In a group with something that fails."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.run())
            await asyncio.sleep(0)
            await failing()


def session(slow: Slow, api: FakeApiServer, directory: Path, patch: pytest.MonkeyPatch) -> Coroutine[Any, Any, None]:
    made = Session(
        node="n1", brains=["x:1"], connect=Dialler(BrainAddress()), holdings=Holdings(), sink=lambda event: None
    )

    async def ended() -> None:
        raise StreamEnded("over")

    patch.setattr(made, "_stream", lambda address: slow.beside(ended))
    return made.run()


class Failing:
    """An input that fails at once."""

    async def run(self, sink: object) -> None:
        await asyncio.sleep(0)
        raise ValueError("bad")


def feed(slow: Slow, api: FakeApiServer, directory: Path, patch: pytest.MonkeyPatch) -> Coroutine[Any, Any, None]:
    made = Feed(Tenant("t1", "acme"), Failing(), store=Store(), policy=UNRESTRICTED)
    patch.setattr(made, "_compile", slow.run)
    return made.run()


def api_input(slow: Slow, api: FakeApiServer, directory: Path, patch: pytest.MonkeyPatch) -> Coroutine[Any, Any, None]:
    made = ApiInput(api.credentials, tenant="t1", resources=["one"], limits=Limits())
    patch.setattr(made, "_reflector", lambda resource, sink: slow)
    slow.begun = made._moved.set
    return made.run(lambda kind, event: None)


def hosted(slow: Slow, api: FakeApiServer, directory: Path, patch: pytest.MonkeyPatch) -> Coroutine[Any, Any, None]:
    (directory / "super").write_bytes(api.kubeconfig())
    access = SuperAccess(SuperCluster(kubeconfig=str(directory / "super")))
    made = HostedTenants(PROJECTS["vcluster"], access, Owners())

    def follow(group: asyncio.TaskGroup, objects: object) -> None:
        group.create_task(slow.run())
        slow.begun = made._lost.set

    patch.setattr(made, "_follow", follow)
    return made.run(lambda event: None)


@pytest.mark.parametrize("make", [session, feed, api_input, hosted])
async def test_who_is_asked_to_end_while_it_clears_up_after_a_failure_ends(
    make: Callable[..., Coroutine[Any, Any, None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow()
    async with FakeApiServer(token="t") as api, asyncio.timeout(10), asyncio.TaskGroup() as group:
        task = group.create_task(make(slow, api, tmp_path, monkeypatch))
        await slow.ending.wait()
        task.cancel()
        slow.release.set()
        await asyncio.wait([task], timeout=1)
        ended = task.done()
        task.cancel()
    assert ended
    assert task.cancelled()
