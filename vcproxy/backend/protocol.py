"""What the node agent asks of a backend.

Calls come from one thread, one at a time; a backend may block. State flows one way: the agent says what is wanted, the
backend makes it so and reports. Timing duties: `apply` with a few changed ports is the hot path and must cost in
proportion to them, never to what is already programmed; `open`, a complete `apply` and `repair` may cost in proportion
to the whole. Atomicity duty: one TenantUpdate is one transaction as packets see it (a first load may be chunked: then
targets come before the frontends that expose them).

Fail static: nothing a backend was not asked to change may change, and closing it leaves all that is programmed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from vcproxy.model.addresses import Prefix
from vcproxy.model.forwarding import ForwardedPort
from vcproxy.model.services import PortKey


class BackendError(Exception):
    """The backend could not do what it was asked; nothing or a consistent earlier state is programmed. Retry later."""


class BackendUnavailable(BackendError):
    """The backend cannot work on this node (no root, no nft, kernel too old): the message says the cure."""


class TenantUpdate(msgspec.Struct, frozen=True):
    """Wanted changes of one tenant's forwarding table.

    `complete`: `put` is the whole table, and whatever else the backend holds for the tenant must go; then `removed` is
    empty. `virtual_ranges`: as in model.Tenant; full state in every update.
    """

    uid: str
    put: tuple[ForwardedPort, ...] = ()
    removed: tuple[PortKey, ...] = ()
    complete: bool = False
    virtual_ranges: tuple[Prefix, ...] = ()


class Rejection(msgspec.Struct, frozen=True):
    """A service port that could not be programmed, or not in full; what is refused keeps its last good form.

    `reason` is for people.
    """

    key: PortKey
    reason: str


class Reconciled(msgspec.Struct, frozen=True):
    """One look for flows to targets that serve no longer, in IP family 4 or 6, and how many `flows` it ended."""

    family: int
    seconds: float
    flows: int


class Applied(msgspec.Struct, frozen=True):
    """What an update cost and what it left out. `operations`: kernel elements (or the like) added plus removed.

    `reconciled`: the looks for stale flows that it took; most updates take none.
    """

    operations: int = 0
    rejections: tuple[Rejection, ...] = ()
    reconciled: tuple[Reconciled, ...] = ()


class Attachments(msgspec.Struct, frozen=True):
    """How the node recognises tenants' packets now: full state, concrete names.

    `interfaces`: device name -> tenant uid (overlay). `addresses`: pod address on this node, 4 or 16 octets -> tenant
    uid (flat network). The super cluster needs none: it is zone 0.
    """

    interfaces: Mapping[str, str] = {}
    addresses: Mapping[bytes, str] = {}


class NodeState(msgspec.Struct, frozen=True):
    """Facts of the node itself: full state.

    `node_addresses`: where NodePorts are accepted (4 or 16 octets each). `local_sources`: pod ranges of the super
    cluster whose traffic to ClusterIPs is not masqueraded; None: no detector, never masquerade by locality (an empty
    tuple means that no source is local). `local_interfaces`: what enters the super cluster by these devices is local,
    too; a name, or a prefix with `*` behind it, of devices that may come and go; they make a detector, too.
    `masquerade_all`: every connection to a ClusterIP is masqueraded.
    `own_addresses`: the node's own, wherever NodePorts are accepted.
    """

    node_addresses: tuple[bytes, ...] = ()
    local_sources: tuple[Prefix, ...] | None = None
    local_interfaces: tuple[str, ...] = ()
    masquerade_all: bool = False
    own_addresses: tuple[bytes, ...] = ()


class Drift(msgspec.Struct, frozen=True):
    """What `repair` found wrong and mended. All zero: nothing."""

    missing: int = 0
    foreign: int = 0
    rebuilt: bool = False


class Backend(Protocol):
    """One way to program forwarding tables. All methods raise BackendError; `open` also BackendUnavailable."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """`options` is backend.options of the NodeConfiguration; unknown or ill-typed ones raise ValueError."""

    def open(self) -> None:
        """Make ready: create what is missing, adopt what an earlier run left, change nothing that forwards."""

    def tenants(self) -> frozenset[str]:
        """Uids that the backend holds state for, adopted ones included."""

    def attachments(self) -> Attachments:
        """What is attached now, by an earlier run too; tenants whose uid is not known any more are left out."""

    def set_node(self, state: NodeState) -> None:
        """Make these the node's facts."""

    def attach(self, attachments: Attachments) -> None:
        """Make these the attachments. A tenant may be attached before its first update and after its removal."""

    def apply(self, update: TenantUpdate) -> Applied:
        """Program an update. A port that cannot be programmed is rejected alone; the rest is committed."""

    def remove_tenant(self, uid: str) -> None:
        """Remove all of a tenant, its conntrack zone's flows included, so that the zone may serve another."""

    def fileno(self) -> int:
        """A descriptor that turns readable when somebody else may have changed what is programmed, or -1."""

    def drifted(self) -> bool:
        """Drain what `fileno` announced; True if `repair` is due. Must be cheap and never block."""

    def repair(self) -> Drift:
        """Compare what is programmed with what is wanted and mend the difference."""

    def dump(self, uid: str | None = None) -> Sequence[Mapping[str, Any]]:
        """What is programmed, as rows for people and for `diff`: read from the kernel, not from memory."""

    def close(self) -> None:
        """Let go of descriptors; all that is programmed stays."""

    def cleanup(self) -> None:
        """Remove all that the backend ever put on this node, also when never opened."""
