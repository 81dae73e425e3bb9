"""Few API servers are listed at a time, and none that hangs holds up the others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.fakes.apiserver import Answer, FakeApiServer, Fault, drip, event, hang, stream
from tests.unit.brain.polling import settle, until
from vcproxy.brain.inputs import TENANT_KINDS, ApiInput
from vcproxy.brain.turns import Turn, Turns
from vcproxy.kube.client import Limits
from vcproxy.kube.kubeconfig import load_kubeconfig
from vcproxy.kube.reflector import Listed


class List:
    """One list, that a test lets begin and end."""

    def __init__(self, turn: Turn, group: asyncio.TaskGroup) -> None:
        self.turn = turn
        self.began = False
        self.end = asyncio.Event()
        self.fault: Exception | None = None
        self.task = group.create_task(self._run())

    async def _run(self) -> None:
        with contextlib.suppress(RuntimeError):
            async with self.turn:
                self.began = True
                await self.end.wait()
                if self.fault is not None:
                    raise self.fault


Start = Callable[[Turn], List]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Begins a list that waits for a turn."""
    lists: list[List] = []
    async with asyncio.TaskGroup() as group:

        def start(turn: Turn) -> List:
            lists.append(List(turn, group))
            return lists[-1]

        yield start
        for one in lists:
            one.task.cancel()


async def test_no_more_than_the_slots_at_a_time_in_the_order_they_came(start: Start) -> None:
    turns = Turns(slots=2)
    lists = [start(Turn(turns)) for _ in range(4)]
    await settle()
    assert [one.began for one in lists] == [True, True, False, False]
    lists[1].end.set()
    await settle()
    assert [one.began for one in lists] == [True, True, True, False]
    lists[0].end.set()
    await settle()
    assert all(one.began for one in lists)


async def test_the_lists_of_one_api_server_are_one_turn(start: Start) -> None:
    turns = Turns(slots=1)
    turn = Turn(turns)
    ours, other = [start(turn) for _ in range(3)], start(Turn(turns))
    await settle()
    assert all(one.began for one in ours)
    ours[0].end.set()
    ours[1].end.set()
    await settle()
    assert not other.began
    ours[2].end.set()
    await settle()
    assert other.began


async def test_who_is_silent_loses_the_turn_and_goes_on(start: Start) -> None:
    turns = Turns(slots=1, lease=0.02)
    silent, other = start(Turn(turns)), start(Turn(turns))
    await until(lambda: other.began)
    assert not silent.task.done()
    silent.end.set()
    await settle()
    assert silent.task.done()


async def test_who_speaks_keeps_the_turn(start: Start) -> None:
    turns = Turns(slots=1, lease=0.1)
    speaking, other = start(Turn(turns)), start(Turn(turns))
    deadline = asyncio.get_running_loop().time() + 0.3
    while asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.01)
        speaking.turn.renew()
    assert not other.began


@pytest.mark.parametrize("how", ["failed", "silent"])
async def test_who_did_not_do_well_waits_with_others_of_that_kind(start: Start, how: str) -> None:
    turns = Turns(slots=1, ill=1, lease=0.02 if how == "silent" else 3600)
    ill = [Turn(turns), Turn(turns)]
    for turn in ill:
        first = start(turn)
        await until(lambda first=first: first.began)
        if how == "failed":
            first.fault = RuntimeError()
        else:
            await until(lambda turn=turn: not turn._held)
        first.end.set()
        await settle()
    turns._well.lease = turns._ill.lease = 3600
    again = [start(turn) for turn in ill]
    await settle()
    assert [one.began for one in again] == [True, False]
    well = start(Turn(turns))
    await settle()
    assert well.began
    again[0].end.set()
    await settle()
    assert again[1].began
    again[1].end.set()
    well.end.set()
    await settle()
    recovered, other = start(ill[0]), start(Turn(turns))  # one good list, and it is among the well
    await settle()
    assert (recovered.began, other.began) == (True, False)


async def test_who_gives_up_waiting_leaves_the_line(start: Start) -> None:
    turns = Turns(slots=1)
    first, gone, last = (start(Turn(turns)) for _ in range(3))
    await settle()
    gone.task.cancel()
    await settle()
    first.end.set()
    await settle()
    assert last.began and not gone.began


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("answer", [hang(), stream(then="hang")], ids=["no answer", "no more"])
async def test_an_api_server_that_hangs_delays_another_by_no_more_than_a_lease(answer: Answer, stream: bool) -> None:
    turns = Turns(slots=1, lease=0.05)
    async with FakeApiServer() as hung, FakeApiServer() as well, asyncio.TaskGroup() as group:
        hung.faults.append(Fault(answer))
        async with following(group, turns, hung, stream) as hung_listed:
            await until(lambda: hung.requests)
            async with following(group, turns, well, stream) as listed:
                await until(lambda: listed)
                assert not hung_listed


@pytest.mark.parametrize("endless", [False, True])
async def test_a_stream_holds_its_turn_until_its_list_has_ended(endless: bool) -> None:
    """And no longer; who speaks without end holds it as with pages, for as long as a list may take."""
    turns = Turns(slots=1, lease=3600)
    limits = Limits(list_seconds=0.6)
    drips = drip(event("ADDED", {"metadata": {"name": "x"}}), every=0.05)
    async with FakeApiServer() as first, FakeApiServer() as second, asyncio.TaskGroup() as group:
        if endless:
            first.faults.append(Fault(drips, times=len(TENANT_KINDS)))
        async with following(group, turns, first, True, limits=limits) as held:
            await until(lambda: len(first.requests) == len(TENANT_KINDS))
            began = asyncio.get_running_loop().time()
            async with following(group, turns, second, True) as listed:
                await until(lambda: listed)
                waited = asyncio.get_running_loop().time() - began
                assert held
    assert waited > 0.4 or not endless


async def test_who_has_no_stream_is_not_ill() -> None:
    turns = Turns(slots=1, ill=1, lease=3600)
    async with FakeApiServer() as api, asyncio.TaskGroup() as group:
        api.watch_list = "refused"
        blocker = Turn(turns)
        blocker._ill = True
        async with blocker, following(group, turns, api, True) as listed:  # nobody ill has a turn meanwhile
            await until(lambda: len(listed) == len(TENANT_KINDS))


@contextlib.asynccontextmanager
async def following(
    group: asyncio.TaskGroup, turns: Turns, api: FakeApiServer, stream: bool, *, limits: Limits | None = None
) -> AsyncIterator[set[str]]:
    """An input meanwhile; the kinds that it has listed."""
    listed: set[str] = set()
    credentials = load_kubeconfig(api.kubeconfig())
    source = ApiInput(
        credentials, tenant="t", resources=TENANT_KINDS, limits=limits or Limits(), turns=turns, stream=stream
    )

    def take(kind: str, event: Any) -> None:
        if isinstance(event, Listed):
            listed.add(kind)

    task = group.create_task(source.run(take))
    try:
        yield listed
    finally:
        task.cancel()
