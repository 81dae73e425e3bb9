"""What a node holds of each tenant, and the events that tell of its changes: the line between session and agent.

Both live on one asyncio loop, so nothing here locks. The session is the only writer while it runs; before it starts,
the agent fills in what the disk cache kept. The agent reads models when it resolves, and what it reads is always a
consistent content of one revision: a snapshot is collected elsewhere and swapped in when it is complete and its digest
is right, a delta is applied between two awaits.

An event says *that* something changed, the holdings say *what* it is now: latest wins, and a slow agent costs no queue.

Not synced is never empty: a tenant with `synced` False may not be programmed, whatever its model says, and what an
earlier run programmed for it stays.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from vcproxy.model.mark import UNMARKED, Mark
from vcproxy.model.node import NodeFacts
from vcproxy.model.services import PortKey
from vcproxy.model.tenant import Tenant, TenantModel
from vcproxy.model.timing import Timing


class Held(msgspec.Struct):
    """One tenant as this node has it. Mutable, and owned by the session while it runs.

    `revision` counts within `brain` (the id of one run of one brain; "" when nothing was received); only the model's
    digest says whether two contents are equal. `synced`: the model is, or once was, all that a brain had: from then on
    empty means empty. It is never unset. `stale_since`: Unix seconds since when the tenant's API server cannot be
    reached, None if it can. `mark`: how new the content is; nothing older is taken. `behind`: why the brain sends
    nothing newer, since it may have less than this node; "" when it has not said so.
    """

    tenant: Tenant
    model: TenantModel = msgspec.field(default_factory=TenantModel)
    revision: int = 0
    brain: str = ""
    synced: bool = False
    stale_since: float | None = None
    stale_reason: str = ""
    mark: Mark = UNMARKED
    behind: str = ""


class Holdings:
    """Tenant uid -> Held. Not thread-safe: the loop thread only.

    `mark`: how new that is what the node was told of itself: its facts, its pods, which tenants are its own.
    """

    def __init__(self) -> None:
        self.mark: Mark = UNMARKED
        self._held: dict[str, Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __contains__(self, uid: object) -> bool:
        return uid in self._held

    def get(self, uid: str) -> Held | None:
        """What is held of the tenant, or None."""
        return self._held.get(uid)

    def put(self, held: Held) -> None:
        """Hold this for `held.tenant.uid`, in place of what was held."""
        self._held[held.tenant.uid] = held

    def drop(self, uid: str) -> Held | None:
        """Forget the tenant; returns what was held, None if nothing."""
        return self._held.pop(uid, None)

    @property
    def tenants(self) -> Mapping[str, Held]:
        """A live read-only view."""
        return self._held


class Extent(NamedTuple):
    """How many Services differ in their own fields, and how many in their endpoints."""

    services: int
    endpoints: int


class TenantChanged(msgspec.Struct, frozen=True):
    """Content or facts (name, virtual ranges) of a tenant changed and are in the holdings.

    `touched`: the keys that may differ; None: everything may. `revision`: what the holdings have now. `extent`: how
    many Services differ, of the super cluster's changes only; None: not counted.
    """

    uid: str
    touched: frozenset[PortKey] | None
    revision: int
    timing: Timing | None = None
    extent: Extent | None = None


class TenantSynced(msgspec.Struct, frozen=True):
    """The node has all that the brain has of the tenant: `Held.synced` is true. Sent even when nothing changed."""

    uid: str


class TenantStale(msgspec.Struct, frozen=True):
    """The tenant's API server cannot be reached since then (Unix seconds), or, with None, can be again."""

    uid: str
    since: float | None
    reason: str = ""


class TenantGone(msgspec.Struct, frozen=True):
    """The brain said that the tenant is gone or placed here no longer. It has left the holdings."""

    uid: str


class TenantsComplete(msgspec.Struct, frozen=True):
    """The brain has listed all its tenant sources and named every tenant of this node: `uids`.

    Whatever else the node holds or has programmed is nobody's and may go. A brain that is still discovering (a fresh
    start, a source that cannot be read) must not say this: the node then keeps everything.
    """

    uids: frozenset[str]


class PlacementChanged(msgspec.Struct, frozen=True):
    """This node's pods on a flat network, full state: address (4 or 16 octets) -> tenant uid."""

    addresses: Mapping[bytes, str]


class FactsChanged(msgspec.Struct, frozen=True):
    """Facts of this node, full state."""

    facts: NodeFacts


class Connected(msgspec.Struct, frozen=True):
    """A stream to a brain stands; `brain` is the id of its run. `sharded`: it has a part of the tenants."""

    brain: str
    sharded: bool = False


class Disconnected(msgspec.Struct, frozen=True):
    """The stream is down and is being made anew; what is held stays."""

    reason: str


SessionEvent = (
    TenantChanged
    | TenantSynced
    | TenantStale
    | TenantGone
    | TenantsComplete
    | PlacementChanged
    | FactsChanged
    | Connected
    | Disconnected
)
