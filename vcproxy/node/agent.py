"""The apply loop: what the session receives becomes what the backend has programmed, tenant by tenant.

One loop, because a backend has one caller; it takes the most urgent thing that is due, awaits the backend's thread, and
looks again. First the node's own duties (repair, facts, attachments), which are few, then the tenants' tasks in turn.
Everything that can fail is a task with a backoff of its own (see pending), so a tenant that fails waits alone.

- *Fail static.* Nothing is programmed of a tenant that is not synced, nothing is removed unless the brain said so: by
  TenantGone, or by TenantsComplete for what an earlier run left behind.
- *The table is newer than the disk.* An agent that was killed leaves a table with all its commits, and files that lack
  the last second of them. So a tenant that is programmed already stays as it is until the brain's word: only what is
  not there is programmed from memory.
- *Fail closed.* A tenant is attached before its first table is programmed, and stays attached after its removal for as
  long as its device is there (see attachments).
- *One revision is one update.* What is resolved is captured between two awaits, with its revision and digest, and that
  revision is acknowledged. Only a first load, which replaces nothing, is cut into chunks, so that a huge tenant's
  start delays the others by one chunk and not by all of it; it is acknowledged when it is complete.
- *A rejected port stays in its last good form*, is reported, and is tried again after a minute, since what it collided
  with (another tenant's node port, say) may have gone.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vcproxy.backend.protocol import Attachments, Backend, BackendError, BackendUnavailable, Rejection
from vcproxy.model.node import NodeFacts
from vcproxy.model.services import PortKey
from vcproxy.model.timing import Timing
from vcproxy.node import pending
from vcproxy.node.attachments import Names
from vcproxy.node.audience import Acknowledge, Memory
from vcproxy.node.config import Attachment
from vcproxy.node.duties import ATTACH, Duties
from vcproxy.node.holdings import (
    Connected,
    Disconnected,
    FactsChanged,
    Held,
    Holdings,
    PlacementChanged,
    SessionEvent,
    TenantChanged,
    TenantGone,
    TenantsComplete,
    TenantStale,
    TenantSynced,
)
from vcproxy.node.localpolicy import local_ports
from vcproxy.node.nodestate import NodeRules
from vcproxy.node.pending import Pending, Task
from vcproxy.node.report import Progress, TenantState
from vcproxy.node.resolver import NodeView
from vcproxy.node.worker import Done, Order, Worker
from vcproxy.ops import garbage, logs

# Ports of a first load that are programmed in one turn: some tens of milliseconds.
CHUNK = 2000
RETRY_REJECTED = 60.0

log = logs.get("agent")


class Agent:
    """Programs what `holdings` has through `backend`. `start`, then `run`; `handle` takes the session's events.

    All methods belong to one event loop. `node` is this node's name.
    """

    def __init__(
        self,
        *,
        node: str,
        backend: Backend,
        holdings: Holdings,
        acknowledge: Acknowledge,
        memory: Memory,
        attachments: tuple[Attachment, ...],
        rules: NodeRules,
        clock: Callable[[], float] = time.monotonic,
        chunk: int = CHUNK,
    ) -> None:
        self.node = node
        self._backend = backend
        self._worker = Worker(backend)
        self._holdings = holdings
        self._acknowledge = acknowledge
        self._memory = memory
        self._clock = clock
        self._chunk = chunk

        self._tasks = Pending()
        self._wake = asyncio.Event()
        self.progress = Progress(clock=clock)
        self.started = False

        self._view = NodeView.of(node)
        self._screened: frozenset[bytes] = frozenset()
        self._programmed: set[str] = set()
        self.adopted: set[str] = set()
        """Remembered tenants that an earlier run has programmed, and that the brain has said nothing about yet."""
        self._duties = Duties(
            backend=backend,
            worker=self._worker,
            holdings=holdings,
            progress=self.progress,
            attachments=attachments,
            rules=rules,
            clock=clock,
            wake=self._wake.set,
            stranger=lambda uid: self._tasks.add(uid, pending.removal(clock())),
        )

    # Start and end.

    async def start(
        self, remembered: list[Held], facts: NodeFacts | None = None, placement: Mapping[bytes, str] | None = None
    ) -> None:
        """Open the backend and program what is remembered and not there; call before the session runs, and after
        `see_links`.

        Returns when everything was tried once. Raises BackendUnavailable; other errors of the backend are retried for
        ever.
        """
        for held in remembered:
            self._holdings.put(held)
        await self._open()
        self._programmed = set(await self._worker.call(self._backend.tenants))
        earlier = await self._worker.call(self._backend.attachments)
        self._duties.begin(earlier, facts, placement, await self._worker.call(self._backend.fileno))
        self.adopted = self._programmed & {held.tenant.uid for held in remembered}
        self._rezone()
        for held in remembered:
            uid = held.tenant.uid
            if uid in self.adopted:  # not programmed by this run, but forwarded: load balancers go on asking
                found = await self._worker.call(local_ports, tuple(held.model), self._view.node_id)
                self.progress.note_local(uid, found, None)
            self._changed(uid, None)
        await self.settle()
        self.started = True

    async def _open(self) -> None:
        attempt = 0
        while True:
            try:
                return await self._worker.call(self._backend.open)
            except BackendUnavailable:
                raise
            except Exception as error:
                log.error("the backend cannot be opened; retrying", error=str(error), attempt=attempt)
            await asyncio.sleep(min(pending.FIRST_RETRY * 2**attempt, pending.LONGEST_RETRY))
            attempt += 1

    async def run(self) -> None:
        """Program whatever changes, for ever. Cancelling waits for the backend call under way."""
        loading = True
        while True:
            self._wake.clear()
            await self.settle()
            if loading and self._duties.informed:
                loading = False
                garbage.settled()
            due = [at for at in (self._tasks.next_at(), self._duties.pending.next_at()) if at is not None]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(min(due) - self._clock(), 0) if due else None):
                    await self._wake.wait()

    async def settle(self) -> None:
        """Do all that is due now; what failed waits for its backoff."""
        while await self._step():
            pass

    async def close(self) -> None:
        """Let go of the backend; all that is programmed stays."""
        self._duties.close()
        await self._worker.close()

    async def dump(self, uid: str | None = None) -> list[Mapping[str, Any]]:
        """What the backend has programmed, as it tells it: for `diff` and `explain`. Raises BackendError."""
        return list(await self._worker.call(self._backend.dump, uid))

    # What is to be done.

    def handle(self, event: SessionEvent) -> None:
        """Take note of an event; the session's sink. Never blocks."""
        match event:
            case TenantChanged(uid=uid, touched=touched, timing=timing, extent=extent):
                self._memory.changed(uid, touched)
                if touched != frozenset():  # else only facts of the tenant are new, its content is still the disk's
                    self.adopted.discard(uid)
                if extent is not None:
                    self.progress.seen(extent)
                self._changed(uid, touched, timing)
            case TenantSynced(uid=uid):
                self.adopted.discard(uid)
                self._changed(uid, frozenset())
            case TenantGone(uid=uid):
                self.adopted.discard(uid)
                if (state := self.progress.tenants.get(uid)) is not None:
                    self._duties.leave(Names(uid, state.name))
                self._tasks.add(uid, pending.removal(self._clock()))
                self._wake.set()
            case TenantsComplete(uids=uids):
                self._duties.name_all(uids)
                self._memory.keep_node(self._duties.facts, self._duties.placement)
            case PlacementChanged(addresses=addresses):
                self._duties.place(addresses)
                self._memory.keep_node(self._duties.facts, self._duties.placement)
            case FactsChanged(facts=facts):
                self._duties.learn(facts)
                self._rezone()
                self._rescreen()
                self._memory.keep_node(self._duties.facts, self._duties.placement)
            case Connected(brain=brain):
                self.progress.connected(brain)
            case Disconnected(reason=reason):
                self._duties.name_all(None)
                self.progress.disconnected(reason)
            case TenantStale():
                pass  # Keep what there is; status reads it from the holdings.

    def see_links(self, names: frozenset[str], addresses: frozenset[bytes]) -> None:
        """The node's devices, and the addresses on them, are these now."""
        self._duties.see_links(names, addresses)
        self._rescreen()

    def _changed(self, uid: str, touched: frozenset[PortKey] | None, timing: Timing | None = None) -> None:
        held = self._holdings.get(uid)
        if held is None:
            return
        state = self.progress.tenants.get(uid)
        if state is None:
            state = self.progress.tenants[uid] = TenantState()
        if state.name != held.tenant.name:
            state.name = held.tenant.name
            self._duties.attend(ATTACH)
        if held.synced and uid not in self.adopted:
            if not state.begun:
                state.begun, touched = True, None
            self._tasks.add(uid, pending.changed(touched, self._clock(), timing))
            self.progress.queued(uid)
            self._wake.set()

    def _rezone(self) -> None:
        """Resolve anew what depends on the zone, if that changed."""
        view = NodeView.of(self.node, self.zone)
        if view != self._view:
            self._view = view
            for uid, held in self._holdings.tenants.items():
                hinted = frozenset(port.key for port in held.model if port.hint_sets)
                if hinted:
                    self._changed(uid, hinted)

    def _rescreen(self) -> None:
        """Resolve anew what leads to addresses that have become this node's."""
        added = self._duties.node_addresses - self._screened
        self._screened = self._duties.node_addresses
        for uid, held in self._holdings.tenants.items() if added else ():
            touched = frozenset(port.key for port in held.model if any(map(port.leads_to, added)))
            if touched:
                self._changed(uid, touched)

    # Doing it.

    async def _step(self) -> bool:
        """Do what is most urgent; False if nothing is due."""
        now = self._clock()
        if duty := self._duties.pending.take(now):
            await self._duties.do(*duty)
        elif task := self._tasks.take(now):
            await self._do_task(*task)
        else:
            return False
        return True

    async def _do_task(self, uid: str, task: Task) -> None:
        if task.remove:
            await self._remove(uid, task)
            return
        held = self._holdings.get(uid)
        if held is not None and held.synced:
            await self._program(uid, task, held, self.progress.tenants[uid])

    async def _remove(self, uid: str, task: Task) -> None:
        if uid not in self._holdings:
            try:
                with self.progress.busy(uid, task):
                    await self._worker.call(self._backend.remove_tenant, uid)
            except Exception as error:
                self.progress.removal_failed()
                self._failed(uid, task, error, revision=0)
                return
            self.progress.succeeded()
            self._programmed.discard(uid)
        if uid not in self._holdings:
            self.progress.forget(uid)
            self._tasks.discard(uid)
            self._memory.forget(uid)
            self._duties.attend(ATTACH)
            log.info("tenant removed", tenant=uid)
        elif (state := self.progress.tenants.get(uid)) is not None:
            # It is back already; whatever is programmed stays until its new content is complete.
            state.begun = False
            self._changed(uid, None)

    async def _program(self, uid: str, task: Task, held: Held, state: TenantState) -> None:
        fresh = uid not in self._programmed
        if task.everything and fresh and len(held.model) > self._chunk:
            task.everything, task.keys = False, set(held.model.ports)
            state.loading = True
        keys, rest = task.keys, set[PortKey]()
        if task.everything:
            state.loading = False
        elif state.loading and len(keys) > self._chunk:
            ordered = list(keys)
            keys, rest = set(ordered[: self._chunk]), set(ordered[self._chunk :])
        revision, brain, digest, ranges = held.revision, held.brain, held.model.digest, held.tenant.virtual_ranges
        denied = self._duties.denied(uid)
        if task.everything:
            order = Order(uid, tuple(held.model), (), True, ranges, self._view, denied)
        else:
            ports = tuple(port for key in keys if (port := held.model.get(key)) is not None)
            gone = tuple(key for key in keys if held.model.get(key) is None)
            order = Order(uid, ports, gone, False, ranges, self._view, denied)

        done: Done | None = None
        if task.everything or keys or fresh or ranges != state.virtual_ranges:
            try:
                with self.progress.busy(uid, task):
                    done = await self._worker.program(order)
            except Exception as error:
                self._failed(uid, task, error, revision=revision)
                return
            self.progress.succeeded()
            self._programmed.add(uid)
            state.virtual_ranges = ranges
            tried = None if task.everything else keys
            self._quarantine(uid, state, tried, done.applied.rejections)
            self.progress.applied(uid, task, done, tried)
        state.error, state.failing_since = "", None
        if rest:
            self._tasks.add(uid, Task(queued_at=task.queued_at, keys=rest, timing=task.timing))
            return
        state.loading = False
        rejections = tuple(Rejection(key, reason) for key, reason in sorted(state.rejected.items()))
        self.progress.committed(uid, state, task, revision=revision, brain=brain, digest=digest, done=done)
        self._acknowledge.committed(uid, revision, digest, rejections, state.microseconds)
        if done is not None:
            self._memory.keep(uid)

    def _quarantine(
        self, uid: str, state: TenantState, tried: set[PortKey] | None, rejections: tuple[Rejection, ...]
    ) -> None:
        """Keep track of the rejected ports after `tried` (None: all) were applied."""
        before = state.rejected
        state.rejected = {} if tried is None else {key: why for key, why in before.items() if key not in tried}
        state.rejected.update((rejection.key, rejection.reason) for rejection in rejections)
        for rejection in rejections:
            if before.get(rejection.key) != rejection.reason:
                log.warning("a service port was rejected", tenant=uid, port=str(rejection.key), reason=rejection.reason)
        if state.rejected:
            again = pending.changed(state.rejected.keys(), self._clock())
            self._tasks.schedule(uid, again, self._clock() + RETRY_REJECTED)

    def _failed(self, uid: str, task: Task, error: Exception, *, revision: int) -> None:
        now = self._clock()
        delay = self._tasks.failed(uid, task, now)
        self.progress.failed(uid, str(error))
        unexpected = None if isinstance(error, BackendError) else error
        log.error(
            "a tenant's update failed; retrying", tenant=uid, error=str(error), retry_in=delay, exc_info=unexpected
        )
        self._acknowledge.failed(uid, revision, str(error))

    # Looking inside.

    @property
    def holdings(self) -> Holdings:
        """What is held; to be read."""
        return self._holdings

    @property
    def facts(self) -> NodeFacts | None:
        """What the brain told of this node; None: nothing yet."""
        return self._duties.facts

    @property
    def zone(self) -> str:
        """This node's zone, "" for none."""
        return self.facts.zone if self.facts else ""

    @property
    def attached(self) -> Attachments:
        """The attachments as last programmed by this run."""
        return self._duties.attached or Attachments()

    @property
    def informed(self) -> bool:
        """True if there is something to go by: the brain named all tenants, or the last good state was there."""
        return self._duties.informed

    def waiting(self) -> Iterator[tuple[str, Task]]:
        """Duties and tenants' tasks that are not done, for health and status."""
        yield from self._duties.pending.waiting()
        yield from self._tasks.waiting()
