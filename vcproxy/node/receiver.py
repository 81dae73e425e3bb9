"""What a node does with what a brain sends: from bytes to holdings and events, without I/O.

Everything that arrives is checked, and content counts only when its digest is right (see content). So the holdings
always are some revision of the tenant, whatever happens on the stream.

Nor does a node go back in time: content that may be older than what is held (`Held.mark`) is not accepted. A brain says
where it is with a tenant before it sends content, and what a stream brings after that only gets newer.

A tenant whose content cannot be accepted is asked for again, at once and then ever more seldom, and what the stream
says of it until then is ignored. Other tenants do not notice. Only what belongs to no tenant (an undecodable message, a
bad placement) ends the stream: `ProtocolError`.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from google.protobuf.message import DecodeError

from vcproxy.model.mark import UNMARKED, Mark, lacking, raised
from vcproxy.model.tenant import SUPER_UID, ModelMismatch
from vcproxy.node.content import Arriving, apply, extent, ports_of
from vcproxy.node.holdings import (
    Connected,
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
from vcproxy.node.outbox import Outbox
from vcproxy.ops import logs, metrics
from vcproxy.pb import convert, distribution_pb2, features
from vcproxy.pb.convert import MalformedModel

RECENT = 64
LONGEST_REASON = 512
REFRESH_SECONDS = (0.0, 1.0, 5.0, 30.0, 120.0)

_log = logs.get("session")


class ProtocolError(Exception):
    """The stream cannot go on: what arrived has no meaning at all."""


class Timer(Protocol):
    """What asyncio's call_later returns."""

    def cancel(self) -> None:
        """Do not call."""


class Receiver:
    """The state of a node towards brains; it outlives streams. `call_later` as asyncio's, in seconds."""

    def __init__(
        self,
        *,
        holdings: Holdings,
        sink: Callable[[SessionEvent], None],
        outbox: Outbox,
        call_later: Callable[[float, Callable[[], None]], Timer],
    ) -> None:
        self._holdings = holdings
        self._sink = sink
        self._outbox = outbox
        self._call_later = call_later
        self._brain = ""
        self._welcomed = False
        self._pods: dict[bytes, str] = {}
        self._arriving: dict[str, Arriving] = {}
        self._awaiting: dict[str, Timer | None] = {}  # asked for anew, or about to be
        self._failures: dict[str, int] = {}
        self._recent: dict[str, dict[bytes, int]] = {}  # uid -> digest -> revision of this brain, newest last
        self._floors: dict[str, Mark] = {}  # as Hello said, until content of this stream was taken
        self._brain_at: dict[str, Mark] = {}
        self._node_behind = ""

    @property
    def node_behind(self) -> str:
        """Why the brain says nothing of the node itself; "" if it does."""
        return self._node_behind

    @property
    def brain(self) -> str:
        """The run of the brain that this stream stands to; "" while it does not."""
        return self._brain if self._welcomed else ""

    def start(self, node: str, agent: str) -> bytes:
        """A stream begins: forget what belonged to the last one. Returns the Hello."""
        self.stop()
        self._floors = {uid: held.mark for uid, held in self._holdings.tenants.items()}
        return distribution_pb2.NodeMessage(
            hello=distribution_pb2.Hello(
                node=node,
                agent=agent,
                features=(features.BATCH, features.SHARDS),
                known=map(known, self._holdings.tenants.values()),
                mark=convert.encode_mark(self._holdings.mark),
            )
        ).SerializeToString()

    def stop(self) -> None:
        """The stream is over."""
        self._welcomed = False
        self._arriving.clear()
        self._floors.clear()
        self._brain_at.clear()
        self._fall_behind("")
        for uid, held in self._holdings.tenants.items():
            if self._heeds("behind", uid):
                self._set_behind(held, "")
        for timer in self._awaiting.values():
            if timer is not None:
                timer.cancel()
        self._awaiting.clear()
        self._outbox.clear()

    def receive(self, raw: bytes) -> None:
        """Act on one BrainMessage. Raises ProtocolError."""
        try:
            message = distribution_pb2.BrainMessage.FromString(raw)
        except DecodeError:
            raise ProtocolError("a message is not a vcproxy.v1.BrainMessage") from None
        for each in message.batch.messages if message.HasField("batch") else (message,):
            self._act(each)

    def _act(self, message: distribution_pb2.BrainMessage) -> None:
        kind = message.WhichOneof("message")
        if kind == "batch":
            raise ProtocolError("a Batch within a Batch")
        if self._welcomed == (kind == "welcome"):
            raise ProtocolError("the first message, and only that, must be Welcome")
        if not self._heeds(kind, getattr(getattr(message, kind), "tenant", "") if kind else ""):
            return
        try:
            match kind:
                case "welcome":
                    self._welcome(message.welcome)
                case "added":
                    self._added(message.added)
                case "snapshot":
                    snapshot = message.snapshot
                    self._guarded(snapshot.tenant, snapshot.revision, lambda held: self._snapshot(held, snapshot))
                case "delta":
                    delta = message.delta
                    self._guarded(delta.tenant, delta.to, lambda held: self._delta(held, delta))
                case "synced":
                    synced = message.synced
                    self._guarded(synced.tenant, synced.revision, lambda held: self._synced(held, synced))
                case "stale":
                    self._stale(message.stale)
                case "behind":
                    self._fell_behind(message.behind)
                case "removed":
                    self._date(message.removed.mark)
                    self._removed(message.removed.tenant)
                case "released":
                    self._released(message.released.tenant)
                case "complete":
                    self._date(message.complete.mark)
                    self._sink(TenantsComplete(frozenset(map(convert.decode_uid, message.complete.tenants))))
                case "placement":
                    self._date(message.placement.mark)
                    self._placement(message.placement)
                case "facts":
                    self._date(message.facts.mark)
                    self._sink(FactsChanged(convert.decode_facts(message.facts)))
                case "node_behind":
                    self._fall_behind(message.node_behind.reason[:LONGEST_REASON])
                case None:
                    pass  # a newer brain says what this agent need not know
        except MalformedModel as error:
            raise ProtocolError(str(error)) from None

    def revision_of(self, uid: str, digest: bytes) -> int | None:
        """What the brain of this stream calls the content, None if it never sent it (another brain did)."""
        return self._recent.get(uid, {}).get(digest)

    def _heeds(self, kind: str | None, uid: str) -> bool:
        """Whether such a message is for this stream to say."""
        return True

    def _welcome(self, message: distribution_pb2.Welcome) -> None:
        self._begin(message.brain)
        self._sink(Connected(message.brain, features.SHARDED in message.features))

    def _begin(self, brain: str) -> None:
        self._welcomed = True
        if brain != self._brain:
            self._brain = brain
            self._recent.clear()

    def _added(self, message: distribution_pb2.TenantAdded) -> None:
        tenant = convert.decode_tenant(message)
        self._brain_at[tenant.uid] = convert.decode_mark(tenant.uid, message.mark)
        held = self._holdings.get(tenant.uid)
        if held is None:
            self._holdings.put(Held(tenant))
        elif held.tenant != tenant:
            held.tenant = tenant
            self._sink(TenantChanged(tenant.uid, frozenset(), held.revision))

    def _stale(self, message: distribution_pb2.TenantStale) -> None:
        held = self._holdings.get(message.tenant)
        if held is None:
            return
        since, reason = (message.since / 1e9, message.reason) if message.since else (None, "")
        if (held.stale_since, held.stale_reason) != (since, reason):
            held.stale_since, held.stale_reason = since, reason
            self._sink(TenantStale(message.tenant, since, reason))

    def _fell_behind(self, message: distribution_pb2.TenantBehind) -> None:
        held = self._holdings.get(message.tenant)
        if held is None:
            return
        reason = message.reason[:LONGEST_REASON]
        if reason and not held.behind:
            _log.warning("the brain may have less than this node", tenant=message.tenant, reason=reason)
        self._set_behind(held, reason)

    @staticmethod
    def _set_behind(held: Held, reason: str) -> None:
        metrics.BEHIND.inc(bool(reason) - bool(held.behind))
        held.behind = reason

    def _date(self, said: Sequence[distribution_pb2.Position]) -> None:
        """What is said of the node itself is so new. Of what the brain does not speak of, nobody knows any more."""
        mark = convert.decode_mark("", said)
        known = {place: at for place, at in self._holdings.mark.items() if place in mark}
        self._holdings.mark = raised(known, mark)

    def _fall_behind(self, reason: str) -> None:
        if reason and not self._node_behind:
            _log.warning("the brain may know less of the super cluster than this node was told", reason=reason)
        metrics.BEHIND.inc(bool(reason) - bool(self._node_behind))
        self._node_behind = reason

    def behind(self) -> list[str]:
        """Of what the brain says nothing, since it may have less than this node: uids of tenants, and the node."""
        found = [uid for uid, held in self._holdings.tenants.items() if held.behind and self._heeds("behind", uid)]
        return [*found, *(["this node's own pods"] if self._node_behind else ())]

    def _judge_age(self, held: Held) -> None:
        """Raises ModelMismatch if what the brain is about to send may be older than what is held."""
        uid = held.tenant.uid
        missing = lacking(self._brain_at.get(uid, UNMARKED), self._floors.get(uid, UNMARKED))
        if missing:
            kind, wanted = next(iter(missing.items()))
            raise ModelMismatch(f"it may be older than what is held, which is of {kind}s up to {wanted.changed}")

    def _comparable(self, held: Held) -> Mark:
        """How new that is what is held, in the kinds that the brain speaks of: of what it took in place of the others
        nobody knows whether it is newer, so their marks are not its marks.
        """
        said = self._brain_at.get(held.tenant.uid, UNMARKED)
        return {kind: position for kind, position in held.mark.items() if kind in said}

    def _removed(self, uid: str) -> None:
        self._settled(uid)
        self._failures.pop(uid, None)
        self._recent.pop(uid, None)
        self._floors.pop(uid, None)
        self._brain_at.pop(uid, None)
        held = self._holdings.drop(uid)
        if held is not None:
            self._set_behind(held, "")
            self._sink(TenantGone(uid))

    def _released(self, uid: str) -> None:
        """This brain feeds the tenant no longer: of a stream that feeds alone that says nothing."""

    def _placement(self, message: distribution_pb2.Placement) -> None:
        put = {convert.decode_address(pod.address): convert.decode_uid(pod.tenant) for pod in message.put}
        pods = {} if message.complete else self._pods
        self._pods = {address: uid for address, uid in pods.items() if address not in set(message.removed)} | put
        self._sink(PlacementChanged(self._pods))

    def _guarded(self, uid: str, revision: int, act: Callable[[Held], None]) -> None:
        """Do what says what a tenant's content is; what is wrong with it is that tenant's trouble alone."""
        held = self._holdings.get(uid)
        if held is None:
            raise ProtocolError(f"content of tenant {uid[:64]!r} came before TenantAdded")
        try:
            act(held)
        except (MalformedModel, ModelMismatch) as error:
            self._wrong(uid, revision, str(error))

    def _snapshot(self, held: Held, message: distribution_pb2.Snapshot) -> None:
        uid, began = message.tenant, time.perf_counter_ns()
        if message.part == 0:
            self._judge_age(held)
            self._arriving[uid] = Arriving(message)
        arriving = self._arriving.get(uid)
        if arriving is None and uid in self._awaiting:
            return  # the rest of one that was refused
        if arriving is None or message.part >= message.parts or not arriving.expects(message):
            raise ModelMismatch(f"part {message.part} of {message.parts} of a snapshot came out of turn")
        for port in ports_of(uid, message):
            arriving.model.put(port)
        arriving.next += 1
        arriving.spent += time.perf_counter_ns() - began
        if arriving.next < arriving.parts:
            return
        del self._arriving[uid]
        if arriving.model.digest != message.digest:
            raise ModelMismatch(f"the snapshot of revision {message.revision} has another digest than announced")
        before, held.model = held.model.ports, arriving.model
        held.mark = raised(self._comparable(held), arriving.mark)
        metrics.RECEIVED.labels("snapshot").inc()
        self._accepted(held, message.revision, message.digest, arriving.spent)
        counted = extent({**dict.fromkeys(held.model.ports), **before}, held.model) if uid == SUPER_UID else None
        self._sink(TenantChanged(uid, None, message.revision, extent=counted))

    def _delta(self, held: Held, message: distribution_pb2.Delta) -> None:
        uid, began = message.tenant, time.perf_counter_ns()
        if uid in self._awaiting:
            return
        self._judge_age(held)
        operations = [convert.decode_operation(uid, operation) for operation in message.operations]
        mark = convert.decode_mark(uid, message.mark)
        before = apply(uid, held.model, operations, digest=message.digest)
        held.mark = raised(self._comparable(held), mark)
        metrics.RECEIVED.labels("delta").inc()
        self._accepted(held, message.to, message.digest, time.perf_counter_ns() - began)
        timing = convert.decode_timing(message.timing)
        counted = extent(before, held.model) if uid == SUPER_UID else None
        self._sink(TenantChanged(uid, frozenset(before), message.to, timing, counted))

    def _synced(self, held: Held, message: distribution_pb2.Synced) -> None:
        uid = message.tenant
        if uid in self._awaiting:
            return
        if held.model.digest != message.digest:
            raise ModelMismatch(f"what is held has another digest than revision {message.revision}")
        held.synced = True
        # The same content: what this brain does not speak of is as new as it was.
        held.mark = {**held.mark, **raised(held.mark, convert.decode_mark(uid, message.mark))}
        self._recognised(held, message.revision, message.digest, 0)
        self._sink(TenantSynced(uid))

    def _accepted(self, held: Held, revision: int, digest: bytes, nanoseconds: int) -> None:
        self._floors.pop(held.tenant.uid, None)
        self._set_behind(held, "")
        self._recognised(held, revision, digest, nanoseconds)

    def _recognised(self, held: Held, revision: int, digest: bytes, nanoseconds: int) -> None:
        """What is held is a content of the brain."""
        uid = held.tenant.uid
        held.revision, held.brain = revision, self._brain
        recent = self._recent.setdefault(uid, {})
        recent.pop(digest, None)
        recent[digest] = revision
        if len(recent) > RECENT:
            del recent[next(iter(recent))]
        self._settled(uid)
        self._failures.pop(uid, None)
        self._outbox.received(uid, revision, digest, nanoseconds // 1000)

    def _settled(self, uid: str) -> None:
        """Nothing is asked for any more, and nothing is arriving."""
        self._arriving.pop(uid, None)
        timer = self._awaiting.pop(uid, None)
        if timer is not None:
            timer.cancel()

    def _wrong(self, uid: str, revision: int, problem: str) -> None:
        """Keep what is held, tell the brain why, and ask for a snapshot: the more often this fails, the later."""
        self._settled(uid)
        failures = self._failures.get(uid, 0)
        self._failures[uid] = failures + 1
        delay = REFRESH_SECONDS[min(failures, len(REFRESH_SECONDS) - 1)]
        _log.warning("what came of a tenant was refused", tenant=uid, revision=revision, reason=problem, retry_in=delay)
        self._outbox.failed(uid, revision, problem)
        if delay:
            self._awaiting[uid] = self._call_later(delay, lambda: self._outbox.refresh(uid))
        else:
            self._awaiting[uid] = None
            self._outbox.refresh(uid)


def known(held: Held) -> distribution_pb2.Known:
    """What a node says that it holds."""
    return distribution_pb2.Known(
        tenant=held.tenant.uid,
        revision=held.revision,
        brain=held.brain,
        digest=held.model.digest,
        mark=convert.encode_mark(held.mark),
    )
