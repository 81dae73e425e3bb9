"""Which tenants a node must know: those whose pods are bound to it, and for a while those whose pods were.

A node is sent the tenants it has pods of and no others: a thousand tenants then cost a node what its own twenty do, and
it never learns of the rest. The facts come from the super cluster's Pods, at binding, before the pod starts. Pods are
claims: `move` says which (node, address, tenant) some object stood for and which it stands for now, and costs as much
as those; the tables that nodes read are counts kept up to date. What an object stands for is held by whoever tells of
it, and nowhere twice: there may be hundreds of thousands.

A tenant whose last pod left a node lingers there, since pods come back (a rolling update, a crash loop) and removing a
tenant only to send all of it again costs most of all.

Where pods run is not always known. `Scope` says what follows: the super cluster's own Services are for every node; a
tenant whose pods nobody can tell us of (a brain without super cluster, given only kubeconfigs) goes to every node too,
until something is known.
"""

import enum
import heapq
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from vcproxy.brain.store import Follower
from vcproxy.kube import shapes
from vcproxy.model.addresses import never_allowed, readable_addresses
from vcproxy.model.endpoints import name_id
from vcproxy.model.mark import UNMARKED, Mark
from vcproxy.model.node import NodeFacts

LINGER_SECONDS = 120.0
_FINISHED = ("Succeeded", "Failed")


class Claim(msgspec.Struct, frozen=True, order=True, gc=False):
    """A pod of `tenant` (uid) is on `node`. `address`: 4 or 16 octets; b"" while it has none yet."""

    node: str
    address: bytes
    tenant: str


class Scope(enum.Enum):
    """Which nodes a tenant is sent to."""

    EVERY_NODE = enum.auto()
    PLACED = enum.auto()
    EVERY_NODE_UNTIL_PLACED = enum.auto()


class _OnNode:
    """What is known of one node. `pods`: whose an address is; `shared`: of addresses that several claim, how often each
    tenant does.
    """

    __slots__ = ("counts", "facts", "lingering", "pods", "shared")

    def __init__(self) -> None:
        self.pods: dict[bytes, str] = {}
        self.shared: dict[bytes, dict[str, int]] = {}
        self.counts: dict[str, int] = {}
        self.lingering: dict[str, float] = {}
        self.facts: NodeFacts | None = None

    def claim(self, address: bytes, tenant: str) -> None:
        """One more has the address."""
        counts = self.shared.get(address)
        if counts is None:
            if address not in self.pods:
                self.pods[address] = tenant
                return
            counts = {self.pods[address]: 1}
        counts[tenant] = counts.get(tenant, 0) + 1
        self._share(address, counts)

    def disclaim(self, address: bytes, tenant: str) -> None:
        """One fewer has it."""
        counts = self.shared.pop(address, None)
        if counts is None:
            del self.pods[address]
            return
        counts[tenant] -= 1
        if not counts[tenant]:
            del counts[tenant]
        self._share(address, counts)

    def _share(self, address: bytes, counts: dict[str, int]) -> None:
        """An address that two tenants claim (overlays, where pod addresses overlap) tells nothing: it is nobody's."""
        if sum(counts.values()) > 1:
            self.shared[address] = counts
        if len(counts) == 1:
            (self.pods[address],) = counts
        else:
            self.pods.pop(address, None)


class Placement:
    """Nodes, their pods and their tenants. Not thread-safe; callbacks are called from within the changing call."""

    def __init__(self, *, linger_seconds: float = LINGER_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._linger_seconds = linger_seconds
        self._clock = clock
        self._nodes: dict[str, _OnNode] = {}
        self._node_addresses: Counter[bytes] = Counter()
        self._placed: dict[str, int] = {}  # claims of a tenant on all nodes
        self._scopes: dict[str, Scope] = {}
        self._everywhere: frozenset[str] = frozenset()
        self._deadlines: list[tuple[float, str, str]] = []
        self._ready = False
        self._age: Follower | None = None
        self._demanded = False
        self._subscribers: dict[object, Callable[[str], None]] = {}

    # --- what nodes read ----------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """All that says where pods run has been read once: from now on what is not said here is not so."""
        return self._ready

    def pods(self, node: str) -> Mapping[bytes, str]:
        """This node's pods on a flat network: address (4 or 16 octets) -> tenant uid. A live read-only view.

        An address that pods of two tenants have is left out: there the network is not flat.
        """
        held = self._nodes.get(node)
        return held.pods if held else {}

    def tenants(self, node: str) -> frozenset[str]:
        """Uids of the tenants this node is to hold. They need not be in the store (yet)."""
        held = self._nodes.get(node)
        return self._everywhere.union(held.counts, held.lingering) if held else self._everywhere

    def facts(self, node: str) -> NodeFacts:
        """The node's own facts; empty ones without a Node object, and after `demand_nodes` then not eligible."""
        held = self._nodes.get(node)
        return (held.facts if held else None) or NodeFacts(eligible=not self._demanded)

    def is_node(self, address: bytes) -> bool:
        """Whether a Node object has this address (4 or 16 octets)."""
        return address in self._node_addresses

    def node_names(self) -> Mapping[int, str]:
        """Names of all nodes known, by the ids that packed endpoints carry."""
        return {name_id(node): node for node in self._nodes}

    def subscribe(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """`callback` gets a node's name after each change of what concerns it, "" after one that may concern any.

        Returns the cancellation.
        """
        token = object()
        self._subscribers[token] = callback

        def cancel() -> None:
            self._subscribers.pop(token, None)

        return cancel

    def mark(self) -> Mark:
        """How new all of this is, as far as it comes from an API server; see vcproxy.model.mark."""
        return self._age.mark() if self._age is not None else UNMARKED

    def overtaken(self, by: Mark) -> None:
        """A node was told something newer: find out, and announce."""
        if self._age is not None:
            self._age.overtaken(by)

    def date(self, age: Follower) -> None:
        """From now on `age` says how new all of this is."""
        self._age = age

    def announce(self) -> None:
        """Have everybody look again."""
        self._announce("")

    def set_ready(self) -> None:
        """Everything has been read once. Never unset: later failures leave what is known as it is."""
        if not self._ready:
            self._ready = True
            self._announce("")

    # --- what sources write -------------------------------------------------------------------------------------------

    def move(self, old: Sequence[Claim], new: Sequence[Claim]) -> None:
        """An object that stood for the claims `old` stands for `new` from now on."""
        if new == old:
            return
        for claim in new:  # before the old ones go, so that no count touches zero in between
            self._count(claim, 1)
        for claim in old:
            self._count(claim, -1)
        for claim in old:
            if claim.address:
                self._nodes[claim.node].disclaim(claim.address, claim.tenant)
        for claim in new:
            if claim.address:
                self._nodes[claim.node].claim(claim.address, claim.tenant)
        self._settle_scopes(claim.tenant for claim in (*old, *new))
        for node in sorted({claim.node for claim in (*old, *new)}):
            self._announce(node)

    def put_facts(self, node: str, facts: NodeFacts | None) -> None:
        """Facts of a node are now these; None when its Node object is gone."""
        held = self._nodes.setdefault(node, _OnNode())
        if held.facts != facts:
            self._node_addresses.update(facts.addresses if facts else ())
            for address in held.facts.addresses if held.facts else ():
                self._node_addresses[address] -= 1
                if not self._node_addresses[address]:
                    del self._node_addresses[address]
            held.facts = facts
            self._announce(node)

    def demand_nodes(self) -> None:
        """All Nodes there are have been told: a node without a Node object is gone, and load balancers are to know."""
        if not self._demanded:
            self._demanded = True
            self._announce("")

    def set_scope(self, uid: str, scope: Scope) -> None:
        """Which nodes the tenant goes to; without being told, it is PLACED."""
        self._scopes[uid] = scope
        self._settle_scopes((uid,))

    def forget(self, uid: str) -> None:
        """The tenant is gone: it is no longer for every node. Claims are the business of whoever made them."""
        self._scopes.pop(uid, None)
        self._settle_scopes((uid,))

    # --- time ---------------------------------------------------------------------------------------------------------

    def next_expiry(self) -> float | None:
        """When to call `expire` next, by the clock that was given; None: nobody lingers."""
        return self._deadlines[0][0] if self._deadlines else None

    def expire(self) -> None:
        """Let go of tenants that have lingered long enough."""
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, node, uid = heapq.heappop(self._deadlines)
            held = self._nodes[node]
            if held.lingering.get(uid) == deadline:
                del held.lingering[uid]
                self._announce(node)

    # --- details ------------------------------------------------------------------------------------------------------

    def _count(self, claim: Claim, step: int) -> None:
        held = self._nodes.setdefault(claim.node, _OnNode())
        count = held.counts.get(claim.tenant, 0) + step
        placed = self._placed.get(claim.tenant, 0) + step
        if count:
            held.counts[claim.tenant] = count
            held.lingering.pop(claim.tenant, None)
        else:
            del held.counts[claim.tenant]
            deadline = self._clock() + self._linger_seconds
            held.lingering[claim.tenant] = deadline
            heapq.heappush(self._deadlines, (deadline, claim.node, claim.tenant))
        if placed:
            self._placed[claim.tenant] = placed
        else:
            del self._placed[claim.tenant]

    def _settle_scopes(self, uids: Iterable[str]) -> None:
        everywhere = set(self._everywhere)
        for uid in set(uids):
            scope = self._scopes.get(uid, Scope.PLACED)
            unplaced = scope is Scope.EVERY_NODE_UNTIL_PLACED and uid not in self._placed
            (everywhere.add if scope is Scope.EVERY_NODE or unplaced else everywhere.discard)(uid)
        if everywhere != self._everywhere:
            self._everywhere = frozenset(everywhere)
            self._announce("")

    def _announce(self, node: str) -> None:
        for callback in list(self._subscribers.values()):
            callback(node)


def pod_claims(pod: shapes.Pod, tenant: str) -> tuple[Claim, ...]:
    """What a Pod of that tenant stands for: from binding until it has ended.

    A Pod on the host's network shares the node's addresses and is nobody's; a finished one still names an address that
    may long be another's.
    """
    if not pod.spec.node_name or pod.spec.host_network or pod.status.phase in _FINISHED:
        return ()
    texts = [said.ip for said in pod.status.pod_ips] or [pod.status.pod_ip]
    node = sys.intern(pod.spec.node_name)
    return tuple(Claim(node, address, tenant) for address in sorted(_usable(texts)) or (b"",))


def slice_claims(found: shapes.EndpointSlice, tenant: str) -> tuple[Claim, ...]:
    """Where the endpoints of a slice run, by its own word: for tenants given as manifests without Pods."""
    claims: set[Claim] = set()
    for endpoint in found.endpoints or ():
        if endpoint.node_name:
            node = sys.intern(endpoint.node_name)
            claims.update(Claim(node, address, tenant) for address in _usable(endpoint.addresses[:1]))
    return tuple(sorted(claims))


def _usable(texts: Iterable[str]) -> set[bytes]:
    return {address for address in readable_addresses(texts) if not never_allowed(address)}
