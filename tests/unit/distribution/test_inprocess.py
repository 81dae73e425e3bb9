"""Brain and node in one process: what is said is the same, and a stream ends as one over gRPC does."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from tests.unit.distribution.rig import ACME, Placed, key, service_port, until
from vcproxy.brain.distribution import Distributor, Limits
from vcproxy.brain.store import Store
from vcproxy.cli import inprocess
from vcproxy.node.holdings import Disconnected, Holdings, SessionEvent
from vcproxy.node.session import IN_PROCESS, Session, StreamEnded


class Halves:
    def __init__(self, *, named: str = "node-a", limits: Limits | None = None) -> None:
        self.store = Store()
        self.distributor = Distributor(store=self.store, placement=Placed({"node-a": [ACME.uid]}), limits=limits)
        self.connect = inprocess.connect(self.distributor, "node-a")
        self.events: list[SessionEvent] = []
        self.holdings = Holdings()
        self.pauses = 0
        self.session = Session(
            node=named,
            brains=[IN_PROCESS],
            connect=self.connect,
            holdings=self.holdings,
            sink=self.events.append,
            sleep=self._sleep,
        )

    async def _sleep(self, seconds: float) -> None:
        self.pauses += 1
        await asyncio.sleep(0)

    def agree(self) -> bool:
        held = self.holdings.get(ACME.uid)
        stored = self.store.tenants()[ACME.uid]
        return held is not None and held.synced and held.model.digest == stored.model.digest


@contextlib.asynccontextmanager
async def running(halves: Halves) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(halves.session.run())
        try:
            yield
        finally:
            task.cancel()


async def test_a_node_gets_what_the_brain_has_and_what_changes() -> None:
    halves = Halves()
    halves.store.add_tenant(ACME)
    halves.store.replace(ACME.uid, [service_port(f"s{at}", *range(100), number=at) for at in range(500)])
    halves.store.set_synced(ACME.uid)
    async with running(halves):
        await until(halves.agree)
        halves.store.update(ACME.uid, [service_port("s1", 7, number=1)], [key("s2")])
        assert not halves.agree()
        await until(halves.agree)
        held = halves.holdings.tenants[ACME.uid]
        halves.session.committed(ACME.uid, held.revision, held.model.digest, (), 5)
        await until(lambda: [t.committed for one in halves.distributor.nodes() for t in one.tenants] == [held.revision])
    assert halves.distributor.nodes() == []


async def test_a_node_of_another_name_is_refused_and_comes_back() -> None:
    halves = Halves(named="node-b")
    async with running(halves):
        await until(lambda: halves.pauses > 2)
    reasons = {event.reason for event in halves.events if isinstance(event, Disconnected)}
    assert len(reasons) == 1
    assert reasons.pop().startswith("PERMISSION_DENIED")


async def test_a_fault_of_the_brains_ends_the_stream_and_not_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    halves = Halves()

    async def attend(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(halves.distributor, "attend", attend)
    with pytest.raises(ExceptionGroup) as raised:
        async with halves.connect(IN_PROCESS, "") as link:
            await link.read()
    assert isinstance(raised.value.exceptions[0], StreamEnded)
    assert "a bug" in str(raised.value.exceptions[0])


async def test_a_node_that_does_not_read_is_not_written_to() -> None:
    halves = Halves()
    halves.store.add_tenant(ACME)
    halves.store.set_synced(ACME.uid)
    async with halves.connect(IN_PROCESS, "") as link:
        await link.write(halves.session._receiver.start("node-a", "1"))
        for number in range(100):
            halves.store.update(ACME.uid, [service_port("s", number, number=1)], [])
            await asyncio.sleep(0)
        messages = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                while True:
                    messages.append(await link.read())
    assert len(messages) < 10, "the newest state, not all that it once was"


def test_vcproxy_run_needs_no_grpc() -> None:
    """Memory, threads and the time of a start: a third of them was gRPC's."""
    code = (
        "import sys, vcproxy.cli.run, vcproxy.cli.inprocess, vcproxy.brain.service, vcproxy.node.service, "
        "vcproxy.ops.events\nsys.exit('grpc' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
