"""What a node does with what should never come: it keeps what it has, says so, and asks again ever more seldom."""

import random
import zlib
from collections.abc import Callable

import pytest

from tests.unit.distribution.rig import ACME, BETA, key, service_port
from vcproxy.backend.protocol import Rejection
from vcproxy.brain import encoding
from vcproxy.brain.encoding import Snapshot, Version
from vcproxy.model.services import ServicePort
from vcproxy.model.tenant import EMPTY_DIGEST, PutPort, TenantModel
from vcproxy.node import content
from vcproxy.node.config import BrainAddress
from vcproxy.node.dialling import Dialler
from vcproxy.node.holdings import Disconnected, Holdings, SessionEvent, TenantChanged
from vcproxy.node.outbox import MOST_REJECTIONS, Outbox
from vcproxy.node.receiver import ProtocolError, Receiver
from vcproxy.node.session import FIRST_PAUSE, LONGEST_PAUSE, Session
from vcproxy.pb import distribution_pb2, model_pb2

PORTS = [service_port(f"svc-{n}", *range(1000), number=n) for n in range(40)]


class Later:
    """asyncio's call_later without time."""

    def __init__(self) -> None:
        self.due: list[tuple[float, Callable[[], None]]] = []

    def __call__(self, delay: float, act: Callable[[], None]) -> "Later":
        self.due.append((delay, act))
        return self

    def cancel(self) -> None:
        self.due.clear()


class Case:
    """A receiver that is welcome and knows of two tenants."""

    def __init__(self) -> None:
        self.later = Later()
        self.holdings = Holdings()
        self.events: list[SessionEvent] = []
        self.outbox = Outbox(lambda: None, lambda delay, act: act())
        self.receiver = Receiver(
            holdings=self.holdings, sink=self.events.append, outbox=self.outbox, call_later=self.later
        )
        self.receiver.start("n", "test")
        self.receiver.receive(encoding.encode_welcome("brain-1", "test"))
        for tenant in (ACME, BETA):
            self.receiver.receive(encoding.encode_added(tenant))

    def content(self, uid: str = "acme-1") -> dict[object, ServicePort]:
        return dict(self.holdings.tenants[uid].model.ports)

    def give(self, *ports: ServicePort, revision: int = 1) -> None:
        snapshot = Snapshot("acme-1", Version(revision, TenantModel(ports).digest), ports)
        for index in range(len(snapshot)):
            self.receiver.receive(snapshot.part(index))

    def said(self) -> list[str]:
        """Short forms of what is to be told to the brain, taken."""
        texts = []
        while (raw := self.outbox.take()) is not None:
            message = distribution_pb2.NodeMessage.FromString(raw)
            ack = message.ack
            if message.WhichOneof("message") == "subscribe":
                texts.append(f"refresh {message.subscribe.tenant}")
            elif ack.error:
                texts.append(f"error {ack.tenant}")
            else:
                texts.append(f"{distribution_pb2.Stage.Name(ack.stage).lower()} {ack.tenant} {ack.revision}")
        return texts


def part(body: bytes, *, encoding: int = 0, digest: bytes = bytes(32), index: int = 0, parts: int = 1) -> bytes:
    return distribution_pb2.BrainMessage(
        snapshot={
            "tenant": "acme-1",
            "revision": 9,
            "digest": digest,
            "part": index,
            "parts": parts,
            "encoding": encoding,  # type: ignore[typeddict-item]
            "ports": body,
        }
    ).SerializeToString()


BAD_CONTENT = {
    "another digest": part(b"", digest=b"\1" * 32),
    "no ServicePorts": part(b"\xff\xff"),
    "no zlib": part(b"plain", encoding=1),
    "cut zlib": part(zlib.compress(b"x" * 1000)[:-4], encoding=1),
    "unknown encoding": part(b"", encoding=7),
    "out of turn": part(b"", index=1, parts=2),
    "no parts": part(b"", index=0, parts=0),
    "a bad port": part(model_pb2.ServicePorts(ports=[model_pb2.ServicePort()]).SerializeToString()),
    "a delta to another digest": encoding.encode_delta(
        "acme-1", Version(1, b""), Version(2, b"\1" * 32), [encoding.encode_operations([PutPort(PORTS[1])])], None
    ),
    "a delta with a short digest": encoding.encode_delta("acme-1", Version(1, b""), Version(2, b"1"), [], None),
    "synced at another digest": encoding.encode_synced("acme-1", Version(5, b"\1" * 32)),
}


@pytest.mark.parametrize("what", BAD_CONTENT)
def test_bad_content_is_refused_whole_and_asked_for_again(what: str) -> None:
    case = Case()
    case.give(PORTS[0])
    case.said(), case.events.clear()
    case.receiver.receive(BAD_CONTENT[what])
    assert case.content() == {PORTS[0].key: PORTS[0]}
    assert case.said() == ["error acme-1", "refresh acme-1"]
    assert case.events == []
    # What else was under way is ignored until the snapshot comes.
    case.receiver.receive(BAD_CONTENT["a delta to another digest"])
    assert case.said() == []
    case.give(PORTS[2], revision=7)
    assert case.content() == {PORTS[2].key: PORTS[2]}
    assert case.said() == ["received acme-1 7"]
    assert case.events == [TenantChanged("acme-1", None, 7)]


def test_a_tenant_that_stays_bad_is_asked_for_ever_more_seldom() -> None:
    case = Case()
    delays = []
    for _ in range(7):
        case.later.due.clear()
        case.receiver.receive(part(b"", digest=b"\1" * 32))
        delays.append(case.later.due[0][0] if case.later.due else 0.0)
        if case.later.due:
            assert case.said() == ["error acme-1"]
            case.later.due[0][1]()
            assert case.said() == ["refresh acme-1"]
        else:
            assert case.said() == ["error acme-1", "refresh acme-1"]
    assert delays == [0, 1, 5, 30, 120, 120, 120]
    case.give(PORTS[0])
    case.later.due.clear()
    case.receiver.receive(part(b"", digest=b"\1" * 32))
    assert not case.later.due, "a success forgives"


def test_one_tenants_trouble_is_no_others() -> None:
    case = Case()
    case.receiver.receive(part(b"\xff\xff"))
    case.receiver.receive(encoding.encode_synced("beta-1", Version(3, EMPTY_DIGEST)))
    assert case.holdings.tenants["beta-1"].synced
    assert not case.holdings.tenants["acme-1"].synced


def test_a_part_that_inflates_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "LARGEST_PART", 1 << 16)
    case = Case()
    case.receiver.receive(part(zlib.compress(bytes(1 << 20)), encoding=1))
    assert case.said() == ["error acme-1", "refresh acme-1"]


def test_parts_of_an_older_snapshot_do_not_mix_with_a_newer_one() -> None:
    case = Case()
    old = Snapshot("acme-1", Version(1, TenantModel(PORTS).digest), PORTS)
    assert len(old) > 2
    case.receiver.receive(old.part(0))
    case.receiver.receive(old.part(1))
    case.give(*PORTS[:30], revision=2)
    assert len(case.content()) == 30
    case.receiver.receive(old.part(2))
    assert len(case.content()) == 30
    assert case.said() == ["received acme-1 2", "error acme-1", "refresh acme-1"]


def test_a_snapshot_is_not_seen_before_it_is_complete() -> None:
    case = Case()
    case.give(PORTS[0])
    case.events.clear()
    snapshot = Snapshot("acme-1", Version(2, TenantModel(PORTS).digest), PORTS)
    for index in range(len(snapshot)):
        assert case.content() == {PORTS[0].key: PORTS[0]}
        assert case.events == []
        case.receiver.receive(snapshot.part(index))
    assert list(case.content().values()) == PORTS


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xff",
        encoding.encode_welcome("brain-1", "again"),
        encoding.encode_synced("unknown", Version(1, EMPTY_DIGEST)),
        encoding.encode_placement([(b"123", "acme-1")], (), complete=True),
        encoding.encode_placement([(b"1234", "../etc")], (), complete=True),
        distribution_pb2.BrainMessage(added={"tenant": "../etc"}).SerializeToString(),
    ],
)
def test_what_makes_no_sense_ends_the_stream(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        Case().receiver.receive(raw)


def test_nothing_is_heard_before_welcome() -> None:
    case = Case()
    case.receiver.start("n", "test")
    with pytest.raises(ProtocolError):
        case.receiver.receive(encoding.encode_added(ACME))


def test_a_message_of_a_later_version_is_passed_over() -> None:
    unknown_field_200 = b"\xc2\x0c\x01x"
    case = Case()
    events = list(case.events)
    case.receiver.receive(unknown_field_200)
    assert case.events == events


def test_hello_names_all_that_is_held() -> None:
    case = Case()
    case.give(PORTS[0])
    hello = distribution_pb2.NodeMessage.FromString(case.receiver.start("n", "test")).hello
    assert {known.tenant: known.digest for known in hello.known} == {
        "acme-1": TenantModel([PORTS[0]]).digest,
        "beta-1": EMPTY_DIGEST,
    }


class Said:
    """An outbox, what it wakes for, and time in a test's hands."""

    def __init__(self) -> None:
        self.later: list[Callable[[], None]] = []
        self.woken = 0
        self.outbox = Outbox(self._wake, lambda delay, act: self.later.append(act))

    def _wake(self) -> None:
        self.woken += 1

    def received(self, revision: int, uid: str = "acme-1") -> None:
        self.outbox.received(uid, revision, EMPTY_DIGEST, 1)

    def committed(self, revision: int, uid: str = "acme-1") -> None:
        self.outbox.committed(uid, revision, EMPTY_DIGEST, [], 1)

    def pass_time(self) -> None:
        due, self.later = self.later, []
        for act in due:
            act()

    def taken(self) -> list[tuple[str, int, int]]:
        acks = [distribution_pb2.NodeMessage.FromString(raw).ack for raw in iter(self.outbox.take, None)]
        return [(ack.tenant, ack.stage, ack.revision) for ack in acks]


def test_outbox_holds_the_newest_of_each_stage() -> None:
    said = Said()
    for revision in range(1, 100):
        said.committed(revision)
        said.received(revision + 1)
    said.pass_time()
    assert said.taken() == [("acme-1", 2, 99), ("acme-1", 1, 100)]


def test_what_a_brain_takes_is_all_that_is_said() -> None:
    outbox = Outbox(lambda: None, lambda delay, act: None)
    outbox.committed("acme-1", 1, EMPTY_DIGEST, [Rejection(key("web"), "x" * 9999)] * 1000, 1)
    raw = outbox.take()
    assert raw is not None and len(raw) < 1 << 20
    assert len(distribution_pb2.NodeMessage.FromString(raw).ack.rejections) == MOST_REJECTIONS


def test_what_is_committed_soon_is_not_said_to_be_received() -> None:
    said = Said()
    said.received(1)
    said.received(7, "beta-1")
    assert (said.woken, said.taken()) == (0, [])
    said.committed(1)
    assert (said.woken, said.taken()) == (1, [("acme-1", 2, 1)])
    said.pass_time()
    assert (said.woken, said.taken()) == (2, [("beta-1", 1, 7)])
    said.received(8, "beta-1")  # a new wait
    assert said.taken() == []
    said.pass_time()
    assert said.taken() == [("beta-1", 1, 8)]


def test_a_commit_does_not_speak_for_newer_content() -> None:
    said = Said()
    said.received(2)
    said.committed(1)
    said.pass_time()
    assert said.taken() == [("acme-1", 2, 1), ("acme-1", 1, 2)]


def test_what_waited_for_a_stream_that_is_over_is_forgotten() -> None:
    said = Said()
    said.received(1)
    said.outbox.clear()
    said.pass_time()
    assert (said.woken, said.taken()) == (0, [])


async def test_pauses_between_attempts_grow_with_each_round_and_are_jittered() -> None:
    pauses: list[float] = []
    events: list[SessionEvent] = []

    class Enough(Exception):
        pass

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 40:
            raise Enough

    session = Session(
        node="n",
        brains=["127.0.0.1:1", "127.0.0.1:2"],
        connect=Dialler(BrainAddress(cert_file="/nonexistent/tls.crt")),
        holdings=Holdings(),
        sink=events.append,
        sleep=sleep,
        clock=lambda: 0.0,
        chance=random.Random(3),
    )
    with pytest.raises(Enough):
        await session.run()
    for attempt, pause in enumerate(pauses, 1):
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt // 2))
        assert longest / 2 <= pause <= longest
    assert len(set(pauses)) == len(pauses)
    assert isinstance(events[0], Disconnected)
    assert "/nonexistent/tls.crt" in events[0].reason
