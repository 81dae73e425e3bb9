"""All tenants of a brain: what sources say becomes feeds, one task each, and their place on nodes.

The only state here is which tenants there are. A source that fails is started again and what it said stays; a tenant is
forgotten when a source says that it was deleted, and for no other reason.

Where brains share tenants (sharding.py), all of them know every tenant and where its pods run; a feed is only for those
that this brain keeps, and what it does not hold, though it keeps it, nodes are not told.
"""

import asyncio
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, NoReturn

from vcproxy.brain.announcer import Announcer
from vcproxy.brain.apiservers import ApiServers
from vcproxy.brain.config import Override
from vcproxy.brain.expiry import Expiries
from vcproxy.brain.feed import Feed
from vcproxy.brain.grants import Grants, matches
from vcproxy.brain.guard import Policy
from vcproxy.brain.inputs import TENANT_KINDS, ApiInput
from vcproxy.brain.ownership import Ownership
from vcproxy.brain.placement import Placement, Scope
from vcproxy.brain.sharding import Everything, Share
from vcproxy.brain.sources import (
    Input,
    Kind,
    Problem,
    Source,
    SourceComplete,
    SourceEvent,
    TenantFound,
    TenantGone,
)
from vcproxy.brain.sources.selfplaced import SelfPlaced
from vcproxy.brain.store import Store
from vcproxy.brain.turns import Turns
from vcproxy.brain.vouched import Vouched
from vcproxy.kube.backoff import Backoff
from vcproxy.kube.errors import KubeconfigError
from vcproxy.kube.kubeconfig import Credentials
from vcproxy.kube.reflector import Event
from vcproxy.model.tenant import Tenant
from vcproxy.ops import logs, metrics

_log = logs.get("tenants")


Rotations = asyncio.Queue[tuple[ApiInput, Credentials, str]]


class _Held:
    """One tenant as `found`, by the source with these `rotations`.

    `feed` None: it exists, but there is nothing to read it with, or it is another brain's: then `aside` is the input
    that is read for where its pods run, None if it does not say.
    """

    def __init__(self, found: TenantFound, group: asyncio.TaskGroup, rotations: Rotations) -> None:
        self.found = found
        self.group = group
        self.rotations = rotations
        self.kept = False
        self.aside: Input | None = None
        self.feed: Feed | None = None
        self.announcer: Announcer | None = None
        self.announcing: asyncio.Task[NoReturn] | None = None
        self.task: asyncio.Task[NoReturn] | None = None
        self.placed: SelfPlaced | None = None
        self.problem = ""


class Tenants:
    """Follows `sources`; `await run()` within a TaskGroup.

    `scope`: which nodes a tenant goes to whose own objects do not say. `ownership`: whose pods are where.
    `rules_known`: whether `grants` are; when they change, or are known, call `regrant`. `completed` is called when the
    last source has told all its tenants, `changed` when there are other tenants than before. `share`: call `reshare`
    when it is another one. `recall` is called with a tenant's uid before it comes into the store.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        *,
        store: Store,
        placement: Placement,
        grants: Grants,
        ownership: Ownership,
        servers: ApiServers,
        vouched: Vouched,
        rules_known: Callable[[], bool],
        scope: Scope,
        completed: Callable[[], None],
        changed: Callable[[], None] = lambda: None,
        share: Share | None = None,
        recall: Callable[[str], object] = lambda uid: None,
    ) -> None:
        self._sources = tuple(sources)
        self._store = store
        self._placement = placement
        self._grants = grants
        self._ownership = ownership
        self._rules_known = rules_known
        self._changed = changed
        self._servers = servers
        self._vouched = vouched
        self._scope = scope
        self._completed = completed
        self._share = share or Everything()
        self._recall = recall
        self._turns = Turns()
        self._expiries = Expiries()
        self._waiting = set(range(len(self._sources)))
        self._held: dict[str, _Held] = {}
        self._failures: dict[int, str] = {}

    @property
    def complete(self) -> bool:
        """Every source has told all its tenants once."""
        return not self._waiting

    @property
    def feeds(self) -> Mapping[str, Feed]:
        """By uid; tenants that cannot be read are missing."""
        return {uid: held.feed for uid, held in self._held.items() if held.feed is not None}

    @property
    def uids(self) -> Collection[str]:
        """All there are, other brains' too."""
        return self._held.keys()

    def matched(self, override: Override) -> int:
        """How many tenants there are for it."""
        return sum(1 for held in self._held.values() if matches(override.match, held.found))

    def policy(self, uid: str) -> Policy | None:
        """What a tenant is granted; None for one that no source has named."""
        held = self._held.get(uid)
        return self._grants.of(held.found).policy if held is not None else None

    def regrant(self) -> None:
        """The grants are others now, or have become known."""
        for held in self._held.values():
            self._apply_grant(held)

    def _apply_grant(self, held: _Held) -> None:
        grant = self._grants.of(held.found)
        if held.feed is None:
            if held.problem:
                self._unreadable(held.found, held.problem)
            return
        if isinstance(held.feed.source, ApiInput):
            held.feed.source.limit(grant.client)
        if held.announcer is not None:
            held.announcer.enabled = grant.events
        held.feed.set_policy(grant.policy, grant.events_per_second)
        held.feed.look()

    def reshare(self) -> bool:
        """This brain's share is another one now. Returns whether tenants were let go."""
        less = False
        for uid, held in self._held.items():
            if self._share.keeps(uid) != held.kept:
                less |= held.kept
                self._settle(held)
            self._store.withhold(uid, not self._share.holds(uid))
        return less

    def problems(self) -> list[Problem]:
        """What is wrong with sources and with tenants' access."""
        found = [problem for source in self._sources for problem in source.problems()]
        found.extend(Problem(f"source {number}", message) for number, message in sorted(self._failures.items()))
        found.extend(Problem(f"tenant {uid}", held.problem) for uid, held in self._held.items() if held.problem)
        found.extend(self._expiries.problems())
        return found

    async def run(self) -> None:
        """Follow all sources and tenants for ever."""
        if self.complete:
            self._completed()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._expiries.run())
            for number, source in enumerate(self._sources):
                group.create_task(self._follow(number, source, group))

    async def _follow(self, number: int, source: Source, group: asyncio.TaskGroup) -> NoReturn:
        """One source, for ever, whatever happens in it."""
        rotations: Rotations = asyncio.Queue()

        def take(event: SourceEvent) -> None:
            match event:
                case TenantFound():
                    self._found(event, group, rotations)
                case TenantGone(uid):
                    self._gone(uid)
                case SourceComplete():
                    waited = bool(self._waiting)
                    self._waiting.discard(number)
                    if waited and not self._waiting:
                        self._completed()

        group.create_task(self._rotate(rotations))
        backoff = Backoff(base=0.5, cap=60.0, uniform=random.uniform)
        while True:
            try:
                await source.run(take)
            except Exception as error:
                self._failures[number] = f"internal error: {error!r}; it is started again"
                _log.exception("source failed, starting it again", source=number)
            await asyncio.sleep(backoff.next())

    async def _rotate(self, rotations: Rotations) -> NoReturn:
        while True:
            source, credentials, uid = await rotations.get()
            held = self._held.get(uid)
            if held is not None and (held.feed is None or held.feed.source is not source):
                continue
            try:
                await source.rotate(credentials)
            except KubeconfigError as error:
                if held is not None:
                    held.problem = f"new credentials are not used: {error}"
                _log.error("new credentials are not used", tenant=uid, error=str(error))
            else:
                if held is not None:
                    held.problem = ""
                    self._expiries.put(uid, credentials)
                    if held.announcer is not None:
                        held.announcer.credentials_changed()
                _log.info("credentials rotated", tenant=uid)

    def _found(self, found: TenantFound, group: asyncio.TaskGroup, rotations: Rotations) -> None:
        held = self._held.setdefault(found.uid, _Held(found, group, rotations))
        held.found = found
        self._apply_grant(held)
        self._changed()
        self._settle(held)

    def _settle(self, held: _Held) -> None:
        """Have the tenant followed as it was found, if it is this brain's."""
        found, uid, access = held.found, held.found.uid, held.found.access
        kept = self._share.keeps(uid)
        if kept != held.kept:
            self._pause(held)
            if held.kept:
                self._forget(uid)
            held.kept, held.problem = kept, ""
        if not kept:
            self._store.expect(uid)
            self._stand_aside(held)
            return
        source = held.feed.source if held.feed is not None else None
        if isinstance(access, Credentials) and isinstance(source, ApiInput):
            held.rotations.put_nowait((source, access, uid))
            return
        if access is None or (source is not None and access is source):
            if held.feed is None:
                held.problem = "cannot be read (yet): see the source's problems"
                self._place(held, uid, self._scope)
                self._unreadable(found, held.problem)
            return
        try:
            source = self._input(access, found)
        except KubeconfigError as error:
            held.problem = str(error)
            _log.error("tenant cannot be read", tenant=uid, error=str(error))
            self._unreadable(found, str(error))
            return
        if held.feed is not None:
            self._stop(held)
        held.problem = ""
        if isinstance(access, Credentials):
            self._expiries.put(uid, access)
        else:
            self._expiries.forget(uid)
        self._start(found, held, source)

    def _stand_aside(self, held: _Held) -> None:
        """Another brain feeds it. Where its pods run is for all to know: files may say it, and are read for that."""
        found, access = held.found, held.found.access
        if held.aside is not None and held.aside is not access:
            self._stop(held)
        if access is None or isinstance(access, Credentials):
            self._place(held, found.uid, self._scope)
        elif held.aside is None:
            held.aside = access
            held.task = held.group.create_task(self._look_on(access, self._placing(held)))

    async def _look_on(self, source: Input, observe: Callable[[Kind, Event[Any]], None]) -> NoReturn:
        backoff = Backoff(base=0.5, cap=60.0, uniform=random.uniform)
        while True:
            try:
                await source.run(observe)
            except Exception:
                _log.exception("a tenant's files are read again")
            await asyncio.sleep(backoff.next())

    def _unreadable(self, found: TenantFound, problem: str) -> None:
        if found.uid not in self._store.tenants():
            self._recall(found.uid)
        self._store.add_tenant(Tenant(found.uid, found.name))
        self._store.withhold(found.uid, not self._share.holds(found.uid))
        if self._store.tenants()[found.uid].remembers:
            self._store.set_stale(found.uid, time.time(), problem)

    def _input(self, access: Credentials | Input, found: TenantFound) -> Input:
        if not isinstance(access, Credentials):
            return access
        grant = self._grants.of(self._held[found.uid].found)
        return ApiInput(
            access,
            tenant=found.uid,
            resources=TENANT_KINDS,
            limits=grant.client,
            timing=grant.timing,
            connect=partial(self._servers.connect, restricted=found.restricted),
            turns=self._turns,
            stream=grant.stream,
        )

    def _start(self, found: TenantFound, held: _Held, source: Input) -> None:
        uid, grant, group = found.uid, self._grants.of(found), held.group
        observe: Callable[[Kind, Event[Any]], None] = lambda kind, event: None  # noqa: E731
        if isinstance(source, ApiInput):
            self._place(held, uid, self._scope)
            held.announcer = Announcer(source.request, tenant=uid, instance=self._store.brain_id)
            held.announcer.enabled = grant.events
            held.announcing = group.create_task(held.announcer.run())
        else:
            observe = self._placing(held)
        if uid not in self._store.tenants():
            self._recall(uid)
        self._ownership.put_api_servers(uid, self._vouched.api_servers(uid))
        held.feed = Feed(
            Tenant(uid, found.name),
            source,
            store=self._store,
            policy=grant.policy,
            events_per_second=grant.events_per_second,
            aliases=self._vouched.aliases(uid),
            observe=observe,
            noticed=held.announcer.tell if held.announcer is not None else lambda refusal: None,
            ownership=self._ownership,
            rules_known=self._rules_known,
            ground=self._placement if found.restricted else None,
        )
        self._store.withhold(uid, not self._share.holds(uid))
        held.task = group.create_task(held.feed.run())
        _log.info("tenant found", tenant=uid, name=found.name)

    def _placing(self, held: _Held) -> Callable[[Kind, Event[Any]], None]:
        """What reads a tenant's files for where its pods run. Until they have been read: unknown is not nowhere."""
        uid, placed = held.found.uid, held.placed
        if placed is None:
            held.placed = placed = SelfPlaced(self._placement, uid)
            self._place(held, uid, Scope.EVERY_NODE)

        def observe(kind: Kind, event: Event[Any]) -> None:
            known = placed.listed
            placed.take(kind, event)
            if placed.listed and not known:
                self._place(held, uid, self._scope)

        return observe

    def _place(self, held: _Held, uid: str, scope: Scope) -> None:
        if self._held.get(uid) is held:
            self._placement.set_scope(uid, scope)

    def _stop(self, held: _Held) -> None:
        self._pause(held)
        if held.placed is not None:
            held.placed.clear()
            held.placed = None

    @staticmethod
    def _pause(held: _Held) -> None:
        """End what runs; where its pods run, as far as its files said, stays."""
        if held.task is not None:
            held.task.cancel()
        if held.announcing is not None:
            held.announcing.cancel()
        held.feed = held.task = held.announcer = held.announcing = held.aside = None

    def _gone(self, uid: str) -> None:
        held = self._held.pop(uid, None)
        if held is None:
            return
        self._stop(held)
        self._store.remove_tenant(uid)
        self._placement.forget(uid)
        self._changed()
        self._forget(uid)
        _log.info("tenant gone", tenant=uid)

    def _forget(self, uid: str) -> None:
        """All that is only known of a tenant because it is followed."""
        self._store.drop(uid)
        self._ownership.forget(uid)
        self._vouched.forget(uid)
        self._expiries.forget(uid)
        for metric in (metrics.EVENTS, metrics.STALE):
            metric.remove(uid)
        for series in (metrics.REFUSED, metrics.RELISTED):
            series.remove_by_labels({"tenant": uid})
