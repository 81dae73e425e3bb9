"""One tenant from its objects to the store: the unit of isolation in the brain.

A feed owns its tenant's input, inbox and compiler. Whatever goes wrong in it (an API server away, a flood, a fault of
ours) ends here: the store keeps the tenant's last good content, the tenant is marked, the feed starts anew after a
while, and no other feed notices.

    input --events--> inbox --batch--> compiler --change--> store

The loop is shared by all tenants, so a feed works in slices of a fraction of a millisecond and then lets others run. A
batch is read completely before anything of it is compiled, and compiled completely before the next one is taken: what
the store sees are consistent steps, each service port as new as the batch.

Empty and unknown are different things. The tenant becomes `synced` in the store when Services and EndpointSlices have
both been listed completely and compiled (and ServiceCIDRs, if the server has them). An API server that is away never
empties anything; but a complete list that is empty (an etcd that was wiped) is the truth, and deletes.

What is taken away from a tenant is taken away at once, whatever its API server does: a right to an address that is lost
passes by the tenant's own changes and its rate; new rules (`set_policy`) first restrict what the store holds, and only
then is everything listed anew. What is granted comes with the next list. Nothing is served before the rules are known.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn

import msgspec

from vcproxy.brain.compiler import Compiler, Key
from vcproxy.brain.compiler import Kind as Compiled
from vcproxy.brain.feedage import FeedAge
from vcproxy.brain.guard import Policy, Refusal, judge_virtual_ranges
from vcproxy.brain.inbox import GONE, Batch, Inbox
from vcproxy.brain.notices import CONFIRM_SECONDS, Notices
from vcproxy.brain.ownership import Ownership, Rights
from vcproxy.brain.ranges import Ranges
from vcproxy.brain.restriction import restrict
from vcproxy.brain.sources import Input, Kind
from vcproxy.brain.store import Follower, Store
from vcproxy.brain.vouched import Aliases
from vcproxy.kube.backoff import Backoff
from vcproxy.kube.budget import Budget
from vcproxy.kube.errors import ShapeError
from vcproxy.kube.reflector import Broken, Event, Listed, Recovered
from vcproxy.model.tenant import Tenant
from vcproxy.model.timing import Timing
from vcproxy.ops import logs, metrics
from vcproxy.ops.stopping import heeded

SLICE_SECONDS = 0.00025
"""How long a feed works before it lets other tasks run: an event of another tenant waits for that some three times."""
FIRST_SLICE_SECONDS = 0.002
"""The same while a tenant is loaded, when there is much to do: with slices of 0.5 ms a start took 6 % longer."""
SHORT_REST = 0.02
"""Seconds between two looks at whether a right has changed, of a tenant that is over its rate."""
RELIST_SECONDS = 60.0
"""At most this often a list is asked for because a tenant at its limits has made room."""

_log = logs.get("feed")


class Feed:
    """Keeps one tenant in `store` up to date from `source`; `await run()` within a TaskGroup.

    `events_per_second`: how many changed objects are compiled on average, 0 for any; beyond it changes of one object
    coalesce for longer. `aliases`: further virtual addresses of its Services. `observe`: gets every event too, after
    the feed took it (placement reads slices there). `noticed`: gets each new refusal, counted already. `ownership`:
    says which endpoint addresses are whose; None: any may be anybody's. `rules_known`: until then nothing is compiled;
    call `look` when it turned true. `ground`: how new what content is compiled by is (see feedage).
    """

    def __init__(
        self,
        tenant: Tenant,
        source: Input,
        *,
        store: Store,
        policy: Policy,
        events_per_second: int = 0,
        aliases: Aliases | None = None,
        observe: Callable[[Kind, Event[Any]], None] = lambda kind, event: None,
        noticed: Callable[[Refusal], None] = lambda refusal: None,
        ownership: Ownership | None = None,
        rules_known: Callable[[], bool] = lambda: True,
        ground: Follower | None = None,
        confirm_seconds: float = CONFIRM_SECONDS,
        backoff: Backoff | None = None,
    ) -> None:
        self.tenant = tenant
        self.source = source
        self.policy = policy
        self.restarts = 0
        self.last_error = ""
        self._store = store
        self._observe = observe
        self._notices = Notices(tenant.uid, stands=self._stands, told=noticed, confirm_seconds=confirm_seconds)
        self._ownership = ownership
        self._rules_known = rules_known
        self._rights: Rights | None = None  # None: endpoints may be anywhere
        self._doubtful: set[bytes] = set()  # addresses to which the right may have changed
        self._renewal = asyncio.Event()
        self._events = metrics.EVENTS.labels(tenant.uid)
        self._rate = 0
        self._budget: Budget | None = None
        self._pace(events_per_second)
        self._backoff = backoff or Backoff(base=0.5, cap=60.0, uniform=random.uniform)
        self._aliases = aliases if aliases is not None else Aliases()
        self._aliases.changed = self._touch
        self._broken: dict[Kind, Broken] = {}
        self._ranges = Ranges()
        self._relist = False
        self._begin()
        self.age = FeedAge(
            source,
            self,
            held=store.tenants()[tenant.uid].mark,
            ground=ground,
            announce=lambda: store.announce(tenant.uid),
            relist=self._ask_for_lists,
        )
        store.follow(tenant.uid, self.age)

    def _begin(self) -> None:
        """Empty hands: everything is listed and compiled anew. What the store holds stays until then."""
        self._rights = None
        if self._ownership is not None and self.policy.judges_backends:
            self._rights = self._ownership.rights(self.tenant.uid, self.policy)
            self._rights.reconsider, self._rights.wake = self._reconsider, self.look
        self.compiler = Compiler(self.policy, rights=self._rights, aliases=self._aliases, noticed=self._notices.notice)
        self._doubtful.clear()
        self._batch: Batch | None = None
        self._inbox = Inbox(held=self._held, wall_ns=time.time_ns)
        self._arrived = asyncio.Event()
        self._complete = False
        self._ranges_known = False
        self._broken.clear()
        self._set_ranges()

    async def run(self) -> NoReturn:
        """Follow the tenant for ever. Nothing but cancellation comes out."""
        try:
            await self._run()
        finally:
            self._notices.close()

    async def _run(self) -> NoReturn:
        while True:
            began, relist = time.monotonic(), False
            try:
                await heeded(self._follow())
            except* _Relist:
                relist = True
            except* Exception as errors:
                self.restarts += 1
                self.last_error = _summary(errors)
                _log.error("feed failed, starting anew", tenant=self.tenant.uid, exc_info=errors)
            if relist:
                continue
            self._store.set_stale(self.tenant.uid, time.time(), f"internal error: {self.last_error}")
            if time.monotonic() - began > 60:
                self._backoff.reset()
            await asyncio.sleep(self._backoff.next())
            self._begin()
            self._store.set_stale(self.tenant.uid, None)

    async def _follow(self) -> None:
        self._relist = False
        self.age.listing()
        async with asyncio.TaskGroup() as group:
            group.create_task(self.source.run(self.take))
            group.create_task(self._compile())
            group.create_task(self.age.run())
            group.create_task(self._until_renewed())

    def take(self, kind: Kind, event: Event[Any]) -> None:
        """One event of the input: remembered at once, compiled soon."""
        if kind == "ServiceCIDR" and isinstance(event, Listed | Broken):
            self._ranges_known = True  # or never will be: the server has none
            self._arrived.set()
        match event:
            case Broken():
                # One that lists anew only now may have been broken for longer.
                since = self._broken.get(kind, event).since
                self._broken[kind] = replace(event, since=min(since, event.since))
                self._judge_health()
            case Recovered():
                self._broken.pop(kind, None)
                self._judge_health()
            case _ if kind == "Service" or kind == "EndpointSlice":
                self._inbox.take(kind, event)
                self._arrived.set()
            case _ if kind == "ServiceCIDR":
                if self._ranges.take(event):
                    self._set_ranges()
        self._observe(kind, event)

    # --- rules --------------------------------------------------------------------------------------------------------

    def set_policy(self, policy: Policy, events_per_second: int = 0) -> None:
        """These rules from now on. What they no longer allow is gone from the store when this returns."""
        self._pace(events_per_second)
        if policy == self.policy:
            return
        old, self.policy = self.policy, policy
        self._begin()
        if self._open:
            self._restrict(None, old)
        self._renewal.set()

    def _pace(self, rate: int) -> None:
        if rate != self._rate:
            self._rate, self._budget = rate, Budget(rate, rate, time.monotonic()) if rate else None

    def look(self) -> None:
        """The rules may be known now."""
        self._arrived.set()

    async def _until_renewed(self) -> NoReturn:
        await self._renewal.wait()
        self._renewal.clear()
        self.age.ended()
        raise _Relist

    @property
    def _open(self) -> bool:
        """Whether the rules are known."""
        return self._rules_known() and (self._rights is None or self._rights.known)

    def _stands(self, refusal: Refusal) -> bool | None:
        if not self.compiler.refuses(refusal):
            return False
        return True if self._open else None

    def _reconsider(self, address: bytes) -> None:
        self._doubtful.add(address)
        self._arrived.set()

    def _settle_rights(self) -> None:
        """Compile what a changed right concerns; what a former run left in the store is restricted."""
        if not self._doubtful or not self._open:
            return
        addresses, self._doubtful = self._doubtful, set()
        change = self.compiler.reconsider(addresses)
        self._store.update(self.tenant.uid, change.put, change.removed)
        if not self._complete:
            self._restrict(addresses, None)

    def _restrict(self, addresses: set[bytes] | None, old: Policy | None) -> None:
        model = self._store.tenants()[self.tenant.uid].model
        change = restrict(model, old, self.policy, self._rights, addresses)
        self._store.update(self.tenant.uid, change.put, change.removed)

    # --- content ------------------------------------------------------------------------------------------------------

    async def _compile(self) -> NoReturn:
        """Batch after batch."""
        relisted = time.monotonic()
        restricted = False
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            if self._open and not restricted:
                restricted = True
                if not self._complete:  # what a former run left was compiled by its rules, and knew its pods
                    self._restrict(None, None)
                    self._judge_health()  # what is remembered may be served now
            self._settle_rights()
            changed = await self._take_batch()
            if self._relist or (self.compiler.starved and time.monotonic() - relisted > RELIST_SECONDS):
                self.age.ended()
                raise _Relist
            if self._budget is not None and (wait := self._budget.spend(changed, time.monotonic())):
                await self._rest(wait)

    async def _take_batch(self) -> int:
        """Read and compile all that waits; returns how many changes it was.

        A call of its own, so that no frame holds a list's objects, many times what is packed of them, until something
        else happens.
        """
        batch = self._batch = self._inbox.drain()
        touched = {kind for kind, _ in batch.items}
        self.age.taken(touched=touched, listed=batch.listed)
        await self._read(batch)
        await self._emit(batch.timing)
        self._batch = None
        self._events.inc(len(batch.items))
        # Many changes of one object cost as one: else a flood would be paid for by ever longer waiting.
        return min(batch.events, len(batch.items))

    async def _rest(self, seconds: float) -> None:
        """The tenant has had its share for so long; only rights that changed are seen to."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._arrived.clear()
            self._settle_rights()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._arrived.wait()
            if not self._doubtful:  # events: they wait in the inbox
                await asyncio.sleep(min(SHORT_REST, max(left, 0)))
        self._arrived.set()

    async def _read(self, batch: Batch) -> None:
        clock, compiler = self._slice(), self.compiler
        for (kind, key), item in batch.items.items():
            if item == GONE:
                compiler.delete(kind, key)
            elif isinstance(item, ShapeError):
                compiler.malformed(kind, item)
            else:
                compiler.put(item)
            if clock.spent():
                self._settle_rights()
                await asyncio.sleep(0)
                clock = self._slice()
        for kind in batch.listed:
            compiler.listed(kind)

    def _slice(self) -> "_Slice":
        return _Slice(SLICE_SECONDS if self._complete else FIRST_SLICE_SECONDS)

    async def _emit(self, timing: Timing) -> None:
        """Compile what the batch made dirty into the store."""
        uid, compiler, store = self.tenant.uid, self.compiler, self._store
        while compiler is self.compiler and compiler.ready and self._open and not compiler.clean:
            change = compiler.flush(self._slice().spent)
            compiled = msgspec.structs.replace(timing, compiled=time.time_ns())
            if self._complete and compiler.clean:
                self.age.telling()
            if store.update(uid, change.put, change.removed, compiled) is not None:
                metrics.COMPILE.observe(max(0, compiled.compiled - compiled.received) / 1e9)
            if not compiler.clean:
                await asyncio.sleep(0)
            self._settle_rights()
        if compiler is self.compiler and compiler.ready and self._open and self._ranges_known and not self._complete:
            self._complete = True
            emitted = compiler.emitted()
            gone = [key for key in store.tenants()[uid].model.ports if key not in emitted]
            store.update(uid, (), gone, timing)
            self.age.settle()
            store.set_synced(uid)
        elif self._complete:
            self.age.settle()

    def _touch(self, keys: Iterable[Key]) -> None:
        self.compiler.touch(keys)
        self._inbox.date()
        self._arrived.set()

    def _held(self, kind: Compiled) -> Iterable[Key]:
        yield from self.compiler.keys(kind)
        if self._batch is not None:
            yield from [key for said, key in self._batch.items if said == kind]

    # --- age ----------------------------------------------------------------------------------------------------------

    @property
    def loading(self) -> bool:
        """Content is a former run's, or nothing."""
        return not self._complete

    @property
    def waiting(self) -> bool:
        """Something that was read is not compiled."""
        return bool(self._inbox) or self._batch is not None

    @property
    def judging(self) -> bool:
        """Something is to be compiled, or judged anew."""
        return not self.compiler.clean or bool(self._doubtful)

    def _ask_for_lists(self) -> None:
        self._relist = True
        self._arrived.set()
        metrics.RELISTED.labels(self.tenant.uid).inc()
        _log.warning("a node is ahead of this brain, all is listed again", tenant=self.tenant.uid)

    # --- facts --------------------------------------------------------------------------------------------------------

    def _set_ranges(self) -> None:
        allowed = judge_virtual_ranges(self._ranges.prefixes(), self.policy)
        self.tenant = msgspec.structs.replace(self.tenant, virtual_ranges=allowed)
        self._store.add_tenant(self.tenant)

    def _judge_health(self) -> None:
        """Stale if Services or EndpointSlices cannot be followed; ServiceCIDRs are a nicety (absent before 1.33)."""
        broken = [event for kind, event in self._broken.items() if kind in ("Service", "EndpointSlice")]
        if broken:
            first = min(broken, key=lambda event: event.since)
            self._store.set_stale(self.tenant.uid, first.since, str(first.error))
        else:
            self._store.set_stale(self.tenant.uid, None)


class _Relist(Exception):
    """A tenant at its limits has made room: what was refused is worth another look."""


class _Slice:
    """A share of the loop's time."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    def spent(self) -> bool:
        """True when others should run."""
        return time.perf_counter() >= self._end


def _summary(errors: BaseExceptionGroup[Exception]) -> str:
    """The innermost exceptions in one line."""
    found: list[str] = []
    for error in errors.exceptions:
        found.append(_summary(error) if isinstance(error, BaseExceptionGroup) else f"{type(error).__name__}: {error}")
    return "; ".join(found)
