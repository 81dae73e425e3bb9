"""What the brain knows of every tenant: compiled models, revisions, and how a node gets from any to the newest.

One loop, synchronous calls, no locks. The compiler side writes (`update`, `replace`, `set_synced`, `set_stale`); the
distribution side reads and is told the uid of whatever changed. Writing costs in proportion to the change: operations
are encoded once, when they are made, and snapshots not before a node needs one.

A tenant that was never synced is incomplete, so nothing of it is ever served: it has no history and no snapshot. But
content that an earlier run had, complete then, is served in its place when the tenant turns out not to be readable
(`remember`): stale since it was read, until the tenant is synced.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

from vcproxy.brain.encoding import Snapshot, Version, port_bound
from vcproxy.brain.history import Delta, History
from vcproxy.model.mark import UNMARKED, Mark, lacking
from vcproxy.model.services import PortKey, ServicePort
from vcproxy.model.tenant import Operation, Tenant, TenantModel
from vcproxy.model.timing import Timing

HISTORY_COUNT = 1024
HISTORY_OCTETS = 256 << 10
SMALL_OCTETS = 4096


class UnknownTenant(KeyError):
    """The store holds no such tenant: add it first."""

    def __init__(self, uid: str) -> None:
        super().__init__(uid)
        self.uid = uid

    def __str__(self) -> str:
        return f"tenant {self.uid!r} is not in the store: call add_tenant first"


class Follower(Protocol):
    """Who keeps a tenant up to date, or what that is decided by."""

    def mark(self) -> Mark:
        """How new the content is now."""

    def overtaken(self, by: Mark) -> None:
        """A node holds content that may be newer in these kinds: find out, and announce the tenant again."""


class Remembered(NamedTuple):
    """Content that an earlier run had, complete as it was at `read_at` (Unix seconds).

    `admit`: what of it may be served by the rules as they are now; None: that is not known (yet).
    """

    tenant: Tenant
    model: TenantModel
    mark: Mark
    read_at: float
    admit: Callable[[TenantModel], TenantModel | None] = lambda model: model


class Stored:
    """One tenant. Read-only to all but the store.

    `revision` counts the changes of content in this run, 0 for a tenant without any. `synced`: content is complete.
    `restored`: it is that of an earlier run. `withheld`: no node is to be told of it now. `stale_since`: Unix seconds,
    None when well. `updated_at`: Unix seconds of the last change of content, 0 for none.
    """

    def __init__(self, tenant: Tenant, remembered: Remembered | None = None) -> None:
        self.tenant = tenant
        self.restored = False
        self.model = TenantModel()
        self.revision = 0
        self.synced = False
        self.withheld = False
        self.stale_since: float | None = None
        self.stale_reason = ""
        self.updated_at = 0.0
        self.octets = 0
        self._follower: Follower | None = None
        self._remembered = remembered
        self._mark = remembered.mark if remembered is not None else UNMARKED
        self._history = History(tenant.uid, count=HISTORY_COUNT)
        self._snapshot: Snapshot | None = None

    @property
    def mark(self) -> Mark:
        """How new the content is."""
        return self._follower.mark() if self._follower is not None else self._mark

    @property
    def version(self) -> Version:
        """The newest content."""
        return Version(self.revision, self.model.digest, self.mark)

    @property
    def history(self) -> History:
        """Its recent revisions."""
        return self._history

    def delta(self, digest: bytes) -> Delta | None:
        """The next delta for a node that holds that content; None if it needs a snapshot.

        None also where a snapshot takes fewer octets than all deltas to the newest content.
        """
        distance = self._history.distance(digest)
        if distance is None or distance > max(self.octets, SMALL_OCTETS):
            return None
        return self._history.delta(digest)

    @property
    def remembers(self) -> bool:
        """There is content of an earlier run that is not served (yet)."""
        return self._remembered is not None

    def overtaken(self, by: Mark) -> None:
        """A node holds content that may be newer in these kinds."""
        if self._follower is not None:
            self._follower.overtaken(by)

    def snapshot(self, floor: Mark = UNMARKED) -> Snapshot:
        """A snapshot of the newest content or of a recent one, not below `floor`, that a small delta leads on from.

        Many nodes that connect at once while the tenant keeps changing so share one encoding.
        """
        cached = self._snapshot
        if cached is not None:
            if cached.version.digest == self.model.digest:
                return cached
            distance = self._history.distance(cached.version.digest)
            small = distance is not None and distance <= max(self.octets // 4, SMALL_OCTETS)
            if small and not lacking(cached.version.mark, floor):
                return cached
        self._snapshot = Snapshot(self.tenant.uid, self.version, self.model)
        return self._snapshot

    def follow(self, follower: Follower | None, mark: Mark) -> None:
        """For the store: from now on the follower says how new the content is; without one it stays at `mark`."""
        self._follower, self._mark = follower, mark

    def restore(self) -> bool:
        """For the store: serve what is remembered, if there is anything. True if that is new."""
        remembered = self._remembered
        admitted = remembered.admit(remembered.model) if remembered is not None and not self.synced else None
        if remembered is None or admitted is None:
            return False
        self._remembered = None
        ranges = self.tenant.virtual_ranges or remembered.tenant.virtual_ranges
        self.tenant = Tenant(self.tenant.uid, self.tenant.name, ranges)
        self.model = admitted
        self.octets = sum(map(port_bound, self.model))
        self.revision += 1
        self.stale_since, self.synced, self.restored = remembered.read_at, True, True
        return True

    def complete(self) -> bool:
        """For the store: content is complete. True if that is new."""
        new = not self.synced or self.restored
        if self.restored:
            self.stale_since, self.stale_reason = None, ""
        self.synced, self.restored, self._remembered = True, False, None
        return new

    def change(
        self, put: Iterable[ServicePort], removed: Iterable[PortKey], timing: Timing | None, now: float
    ) -> int | None:
        """For the store: change content; returns the new revision, None if nothing changed."""
        before = Version(self.revision, self.model.digest)
        operations: list[Operation] = []
        for key in removed:
            old = self.model.get(key)
            operation = self.model.remove(key)
            if operation is not None and old is not None:
                self.octets -= port_bound(old)
                operations.append(operation)
        for port in put:
            old = self.model.get(port.key)
            operation = self.model.put(port)
            if operation is not None:
                self.octets += port_bound(port) - (port_bound(old) if old is not None else 0)
                operations.append(operation)
        if not operations:
            return None
        self.revision += 1
        self.updated_at = now
        if self.synced:
            room = max(HISTORY_OCTETS, self.octets // 4)
            self._history.record(before, self.version, operations, timing, room=room)
        return self.revision


class Store:
    """All tenants of one brain. `brain_id` names this run: revisions count within it."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self.brain_id = secrets.token_hex(8)
        self._clock = clock
        self._stored: dict[str, Stored] = {}
        self._gone: set[str] = set()
        self._remembered: dict[str, Remembered] = {}
        self._subscribers: dict[object, Callable[[str], None]] = {}

    def add_tenant(self, tenant: Tenant) -> None:
        """Hold this tenant. Adding it again is no error; changed facts are announced anew."""
        stored = self._stored.get(tenant.uid)
        if stored is None:
            self._stored[tenant.uid] = Stored(tenant, self._remembered.pop(tenant.uid, None))
            self._gone.discard(tenant.uid)
        elif stored.tenant != tenant:
            stored.tenant = tenant
        else:
            return
        self._changed(tenant.uid)

    def remember(self, remembered: Iterable[Remembered]) -> None:
        """What an earlier run had; call before tenants are added. Not said of a tenant before it is found."""
        self._remembered.update((one.tenant.uid, one) for one in remembered)

    def forget_remembered(self) -> None:
        """Every tenant there is was added: forget what is remembered of others."""
        self._remembered.clear()

    def remove_tenant(self, uid: str) -> None:
        """The tenant is gone for good: nodes are told to remove it. Removing an unknown one is no error."""
        self._stored.pop(uid, None)
        self._gone.add(uid)
        self._changed(uid)

    def expect(self, uid: str) -> None:
        """There is such a tenant (again), though it is not held here."""
        if uid in self._gone:
            self._gone.discard(uid)
            self._changed(uid)

    def drop(self, uid: str) -> None:
        """Say nothing of the tenant from now on: it is not gone, but another brain's. An unknown one is no error."""
        if self._stored.pop(uid, None) is not None:
            self._changed(uid)

    def withhold(self, uid: str, withheld: bool) -> None:
        """Whether nodes are to be told nothing of the tenant for now. Of one that is not held: no error."""
        stored = self._stored.get(uid)
        if stored is not None and stored.withheld != withheld:
            stored.withheld = withheld
            self._changed(uid)

    def update(
        self, uid: str, put: Iterable[ServicePort], removed: Iterable[PortKey], timing: Timing | None = None
    ) -> int | None:
        """Change some service ports (removals first). Returns the new revision, None if nothing changed.

        Raises UnknownTenant.
        """
        revision = self._get(uid).change(put, removed, timing, self._clock())
        if revision is not None:
            self._changed(uid)
        return revision

    def replace(self, uid: str, ports: Iterable[ServicePort], timing: Timing | None = None) -> int | None:
        """Make these all the tenant's service ports, by the smallest change of what is held. As `update`."""
        wanted = {port.key: port for port in ports}
        removed = [key for key in self._get(uid).model.ports if key not in wanted]
        return self.update(uid, wanted.values(), removed, timing)

    def follow(self, uid: str, follower: Follower) -> None:
        """`follower` keeps the tenant up to date from now on, and says how new the content is. Raises UnknownTenant."""
        stored = self._get(uid)
        stored.follow(follower, stored.mark)

    def announce(self, uid: str) -> None:
        """Have everybody look at the tenant again, though its content may be the same."""
        self._changed(uid)

    def set_synced(self, uid: str) -> None:
        """Content is complete: from now on it may be served. Never unset. Raises UnknownTenant."""
        if self._get(uid).complete():
            self._changed(uid)

    def set_stale(self, uid: str, since: float | None, reason: str = "") -> None:
        """The tenant's API server cannot be reached since then (Unix seconds); None: well again. Raises UnknownTenant.

        Content stays as it is; of one that was not synced, it is what an earlier run had, if that is remembered: stale
        since it was read then, until it is synced.
        """
        stored = self._get(uid)
        reason = reason if since is not None else ""
        restored = since is not None and stored.restore()
        if stored.restored:
            since = stored.stale_since
            reason = f"not read since the brain started; what it had before is served: {reason}" if reason else ""
        if restored or (stored.stale_since, stored.stale_reason) != (since, reason):
            stored.stale_since, stored.stale_reason = since, reason
            self._changed(uid)

    def tenants(self) -> Mapping[str, Stored]:
        """A live read-only view."""
        return self._stored

    def gone(self, uid: str) -> bool:
        """True if the tenant was removed in this run. An unknown tenant is not gone: it may not have been found yet."""
        return uid in self._gone

    def subscribe(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """`callback` gets the uid after each change, synchronously: it must be quick. Returns the cancellation."""
        token = object()
        self._subscribers[token] = callback

        def cancel() -> None:
            self._subscribers.pop(token, None)

        return cancel

    def _get(self, uid: str) -> Stored:
        try:
            return self._stored[uid]
        except KeyError:
            raise UnknownTenant(uid) from None

    def _changed(self, uid: str) -> None:
        for callback in list(self._subscribers.values()):
            callback(uid)
