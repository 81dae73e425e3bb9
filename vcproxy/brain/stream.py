"""What one node is sent next: the whole of the distribution's logic, without I/O.

A stream has no queue. It knows what the node holds of each tenant (by digest) and which tenants may be out of date,
and makes the next messages only when the transport is ready to take some: so a slow node gets the newest state, in
fewer and larger steps, and costs no memory. Tenants take turns, one message each, and parts of a snapshot are messages
like any other: a huge tenant never delays a small one.

Nothing is said of what is not known for sure. A tenant that was not synced in this run is not mentioned, so a node
keeps what it has; that a tenant is no longer placed on the node, which pods it has and what else it is, is said only
once the placement is ready, that is, complete.

Nor is a node taken back in time. What it held when it came, from this replica or another, is a floor (its mark), and
what may be older than that is not sent: the store is told that it was overtaken, and the node keeps what it has until
this brain has found out what is true (see chronicle). The same holds for what it was told of itself, its pods and which
tenants are its own, by what is known of the super cluster (see superage): of that nothing is said meanwhile.

Where brains share tenants a node has several streams, and what is said on one depends on its `Kind`. Contents come on
content streams, from whichever brain feeds the tenant; when one begins to, the node may have got newer content from
another since it said Hello, so it is asked (TenantAdded.asks) and answers before anything is sent. All else comes on
one leading stream, so that two brains with different views cannot make a node waver; it has the super cluster's own
Services too, which every brain feeds.
"""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from vcproxy.brain import encoding
from vcproxy.brain.admission import Admission
from vcproxy.brain.encoding import Version
from vcproxy.brain.greeting import Greeting, Kind
from vcproxy.brain.progress import NodeStatus, TenantStatus
from vcproxy.brain.store import Store, Stored
from vcproxy.brain.told import Told
from vcproxy.model.mark import UNMARKED, Mark, Position, lacking
from vcproxy.model.node import NodeFacts
from vcproxy.model.tenant import SUPER_UID
from vcproxy.pb import convert, distribution_pb2, features

BATCH_OCTETS = 64 << 10
"""What is sent in one go, plus one message: of that size is a flow-control window of HTTP/2."""


class Placement(Protocol):
    """Which pods and tenants are on which node."""

    @property
    def ready(self) -> bool:
        """True once everything that says where pods run was read completely, and never false again.

        That includes tenants placed everywhere: `super` is in the store by then, if it is proxied at all. Before, the
        answers below may lack something, and a node is not told to forget anything.
        """

    def pods(self, node: str) -> Mapping[bytes, str]:
        """Pod address (4 or 16 octets) -> tenant uid."""

    def tenants(self, node: str) -> frozenset[str]:
        """Uids of the tenants to send to the node."""

    def facts(self, node: str) -> NodeFacts:
        """What the node is to know of itself."""

    def mark(self) -> Mark:
        """How new these answers are."""

    def overtaken(self, by: Mark) -> None:
        """A node was told something newer: find out, and tell subscribers."""

    def subscribe(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """`callback` gets a node's name when an answer about it changed, or "" when `ready` or many did."""


class Message(NamedTuple):
    """A BrainMessage's bytes and its kind, the name of the field of BrainMessage that is set."""

    kind: str
    data: bytes


class Stream:
    """One node's stream. `wake` is called whenever `next_message` may have something again."""

    def __init__(
        self,
        greeting: Greeting,
        *,
        peer: str,
        version: str,
        sharded: bool = False,
        store: Store,
        placement: Placement,
        admission: Admission,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.node = greeting.node
        self.entitled: frozenset[str] = frozenset()
        self._agent = greeting.agent
        self._peer = peer
        self._since = time.time()
        self._store = store
        self._placement = placement
        self._admission = admission
        self._wake = wake
        self._clock = clock
        marks, unheard = greeting.marks, greeting.unheard
        self.kind = greeting.kind(sharded=sharded)
        self._batches = features.BATCH in greeting.features
        self._features = (features.CONTENT, *((features.SHARDED,) if sharded else ()))
        self._told = {
            uid: Told(held, clock, marks.get(uid, UNMARKED), unheard.get(uid, frozenset()))
            for uid, held in greeting.known.items()
            if self._covers(uid)
        }
        self._dirty = dict.fromkeys(self._told)
        self._version = version
        self._welcomed = False
        self._complete = False
        self._floor = greeting.mark
        self._behind: str | None = None
        self._named: frozenset[str] | None = None  # on a leading stream
        self._look = False  # at facts and pods
        self._facts: NodeFacts | None = None
        self._pods: dict[bytes, str] | None = None
        self.plan()

    def mark(self, uid: str) -> None:
        """The tenant may have changed."""
        if self.kind is Kind.LEADING and self._store.gone(uid):
            self._look = True
        self._dirty[uid] = None
        self._wake()

    def plan(self) -> None:
        """The placement of this node may have changed, or become ready."""
        entitled = self._placement.tenants(self.node)
        self._dirty.update(dict.fromkeys(sorted(entitled ^ self.entitled)))
        if self._placement.ready and not self._complete:
            self._dirty.update(dict.fromkeys(self._told))
        self.entitled = entitled
        self._look = True
        self._wake()

    def close(self) -> None:
        """The stream is over: let go of what others wait for."""
        for told in self._told.values():
            told.forget_snapshot()

    def next_messages(self) -> list[Message]:
        """What to send now in one go, taken as sent; []: nothing until `wake` is called.

        All that waits, within bounds: the transport says when it can take more, and on a busy machine that takes much
        longer than a message lasts. One by one they would queue for it, and be older with each.
        """
        found: list[Message] = []
        octets = 0
        while (message := self.next_message()) is not None:
            found.append(message)
            octets += len(message.data)
            if not self._batches or octets >= BATCH_OCTETS or message.kind == "welcome":
                break
        return found

    def next_message(self) -> Message | None:
        """The next one of them, alone."""
        if not self._welcomed:
            self._welcomed = True
            return Message("welcome", encoding.encode_welcome(self._store.brain_id, self._version, self._features))
        if self._look and self._placement.ready and self.kind is not Kind.CONTENT:
            message = self._about_node()
            if message is not None:
                return message
            self._look = False
        while self._dirty:
            uid = next(iter(self._dirty))
            del self._dirty[uid]
            message = self._about_tenant(uid)
            if message is not None:
                if not self._settled(uid):
                    self._dirty[uid] = None  # there may be more: at the end of the round
                return message
        return None

    def _settled(self, uid: str) -> bool:
        """Nothing more is to be said of a tenant that something was just said of."""
        told, stored = self._told.get(uid), self._store.tenants().get(uid)
        return told is not None and stored is not None and told.settled(stored)

    def _behind_node(self) -> str | None:
        """Why nothing is said of the node itself: it was told something newer than what this brain knows for sure."""
        if not self._floor:
            return None
        if not self._placement.ready:
            return ""
        mark = self._placement.mark()
        missing = lacking(mark, self._floor)
        if not missing:
            self._floor = UNMARKED
            self._dirty.update(dict.fromkeys(self._told))
            return None
        self._placement.overtaken(missing)
        place, wanted = next(iter(missing.items()))
        return _behind(place, wanted, mark[place])

    def _about_node(self) -> Message | None:
        behind = self._behind_node()
        if behind is not None or self._behind is not None:
            if behind == self._behind:
                return None
            self._behind = behind
            return Message("node_behind", encoding.encode_node_behind(behind or ""))
        facts = self._placement.facts(self.node)
        if facts != self._facts:
            self._facts = facts
            return Message("facts", encoding.encode_facts(facts, self._placement.mark()))
        pods, told = self._placement.pods(self.node), self._pods
        if told is None or pods != told:
            self._pods = dict(pods)
            put = [(address, uid) for address, uid in pods.items() if told is None or told.get(address) != uid]
            removed = [address for address in told or () if address not in pods]
            mark = self._placement.mark()
            return Message("placement", encoding.encode_placement(put, removed, mark, complete=told is None))
        first, self._complete = not self._complete, True
        if self.kind is not Kind.LEADING:
            return self._name(self.entitled) if first else None
        named = frozenset(uid for uid in self.entitled if not self._store.gone(uid))
        if self._named == named:
            return None
        self._named = named
        return self._name(named)

    def _name(self, uids: frozenset[str]) -> Message:
        return Message("complete", encoding.encode_complete(uids, self._placement.mark()))

    def _covers(self, uid: str) -> bool:
        """Whether a tenant's content is a matter of this stream."""
        return self.kind is Kind.WHOLE or (uid == SUPER_UID) == (self.kind is Kind.LEADING)

    def _about_tenant(self, uid: str) -> Message | None:
        told, stored = self._told.get(uid), self._store.tenants().get(uid)
        placed = uid in self.entitled
        if not self._covers(uid):
            return None
        served = stored if placed and stored is not None and stored.synced and not stored.withheld else None
        if self.kind is Kind.CONTENT:
            return self._about_share(uid, told, served)
        if self._store.gone(uid) or (not placed and self._placement.ready):
            if told is None or self._behind_node() is not None:
                return None
            told.forget_snapshot()
            del self._told[uid]
            return Message("removed", encoding.encode_removed(uid, self._placement.mark()))
        if served is None:
            return None
        if told is None:
            told = self._told[uid] = Told(None, self._clock)
        return self._progress(told, served)

    def _about_share(self, uid: str, told: Told | None, served: Stored | None) -> Message | None:
        """Of a tenant that may be another brain's before and after."""
        if told is not None and told.of is not served:
            told.forget_snapshot()
            del self._told[uid]
            return Message("released", encoding.encode_released(uid))
        if served is None:
            return None
        if told is None:
            told = self._told[uid] = Told(None, self._clock, of=served)
        return self._progress(told, served)

    def _progress(self, told: Told, stored: Stored) -> Message | None:
        if told.paused:
            return None
        if told.facts != stored.tenant:
            return self._introduce(told, stored)
        if told.asked:
            return None
        return self._content(told, stored) or self._condition(told, stored)

    @staticmethod
    def _introduce(told: Told, stored: Stored) -> Message:
        # A node compares only what both sides speak of: of an epoch that is not believed here it must not insist.
        told.facts = stored.tenant
        told.shown = {kind: position for kind, position in stored.mark.items() if kind not in told.unheard}
        return Message("added", encoding.encode_added(stored.tenant, told.shown, asks=told.asked))

    def _content(self, told: Told, stored: Stored) -> Message | None:
        """The next step towards the newest content, None if there is none to take now."""
        if told.snapshot is None:
            if told.digest == stored.model.digest and not told.refresh:
                return self._judge_age(told, stored, UNMARKED)
            if told.floor:
                missing = lacking(stored.mark, told.floor)
                if missing or told.behind:
                    return self._judge_age(told, stored, missing)
                if lacking(told.shown, told.floor):
                    return self._introduce(told, stored)
            delta = None if told.refresh else stored.delta(told.digest)
            if delta is not None and self._fits(delta.after, told, stored):
                self._took(told, delta.after, stored)
                return Message("delta", delta.message)
            told.snapshot = stored.snapshot(told.floor)
        if told.ticket is None or not told.ticket.held:
            # Asked for a second time only by a stream whose lease ran out; while it queues, other tenants take turns.
            if told.ticket is None or not told.ticket.queued:
                uid = stored.tenant.uid
                told.ticket = self._admission.ask(lambda: self.mark(uid))
            if not told.ticket.held:
                return None
        told.ticket.renew()
        message = Message("snapshot", told.snapshot.part(told.part))
        told.part += 1
        if told.part == len(told.snapshot):
            told.refresh = False
            self._took(told, told.snapshot.version, stored)
            told.forget_snapshot()
        return message

    @staticmethod
    def _fits(version: Version, told: Told, stored: Stored) -> bool:
        """Whether a content is not older than what the node came with; the newest is known not to be."""
        return version.digest == stored.model.digest or not lacking(version.mark, told.floor)

    @staticmethod
    def _took(told: Told, version: Version, stored: Stored) -> None:
        told.digest = version.digest
        if version.digest == stored.model.digest:
            told.floor = UNMARKED
        told.progress.sent(version)

    @staticmethod
    def _judge_age(told: Told, stored: Stored, missing: Mark) -> Message | None:
        """What is to be said of this brain being behind the node in these kinds, if that is new."""
        reason = "; ".join(_behind(kind, wanted, stored.mark[kind]) for kind, wanted in missing.items())
        if missing:
            stored.overtaken(missing)
        if bool(reason) == bool(told.behind):
            return None
        told.behind = reason
        return Message("behind", encoding.encode_behind(stored.tenant.uid, reason))

    def _condition(self, told: Told, stored: Stored) -> Message | None:
        if told.snapshot is not None:
            return None
        uid = stored.tenant.uid
        if not told.synced and not told.behind:
            told.synced = True
            return Message("synced", encoding.encode_synced(uid, stored.version))
        stale = (stored.stale_since, stored.stale_reason)
        if told.stale != stale:
            told.stale = stale
            return Message("stale", encoding.encode_stale(uid, *stale))
        return None

    def acknowledged(self, ack: distribution_pb2.Ack) -> None:
        """The node received or committed something. Raises MalformedModel."""
        told = self._told.get(ack.tenant)
        if told is not None:
            told.progress.acknowledged(ack)

    def subscribed(self, uid: str, *, refresh: bool) -> None:
        """The node asks for a tenant; ignored if it is not placed there. Raises MalformedModel.

        `refresh`: its copy is wrong, whatever digest it has: send a snapshot.
        """
        convert.decode_uid(uid)
        told = self._told.get(uid)
        if self.kind is Kind.CONTENT and told is not None and not refresh:
            told.forget_snapshot()
            told = self._told[uid] = Told(None, self._clock, of=told.of)
        if told is None and self.kind is Kind.CONTENT:
            return
        if told is None:
            if uid not in self.entitled:
                return
            told = self._told[uid] = Told(None, self._clock)
        told.paused = False
        if refresh:
            told.forget_snapshot()
            told.refresh, told.synced = True, False
        self.mark(uid)

    def answered(self, uid: str, digest: bytes, mark: Mark, unheard: frozenset[str]) -> None:
        """The node was asked and holds this. What nobody asked for, or no longer, is no news."""
        told = self._told.get(uid)
        if told is not None and told.asked:
            told.asked = False
            told.digest, told.floor, told.unheard = digest, mark, unheard
            if unheard:
                told.facts = None  # to be introduced again, without them
            told.stale = None  # whatever another brain has said
            self.mark(uid)

    def unsubscribed(self, uid: str) -> None:
        """The node wants nothing of a tenant until it subscribes again. It keeps what it holds."""
        told = self._told.get(uid)
        if told is not None:
            told.paused = True
            told.forget_snapshot()

    def status(self) -> NodeStatus:
        """For people: what was sent and what came of it."""
        tenants: list[TenantStatus] = []
        for uid in sorted(filter(self._covers, self.entitled)):
            told, stored = self._told.get(uid), self._store.tenants().get(uid)
            if told is not None and stored is not None:
                tenants.append(told.progress.status(uid, stored.tenant.name, stored.version, told.behind))
        return NodeStatus(self.node, self._peer, self._agent, self._since, tuple(tenants), self.kind.value)


def _behind(kind: str, wanted: Position, held: Position) -> str:
    what = kind.rpartition("/")[2] if "/" in kind else f"{kind}s"
    if held.epoch < wanted.epoch:
        return f"the history of {what} was rewritten, and this brain has not read it since"
    return f"this brain has read {what} up to version {held.seen}, the node has version {wanted.changed}"
