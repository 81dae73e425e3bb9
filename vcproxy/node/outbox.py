"""What a node has to tell the brain: the newest of each tenant and stage only; a slow stream costs no memory.

Reading a message costs a brain as much as writing one, and a thousand nodes have something to say to each change. So
that content was received is held back for a moment: nearly always it is committed by then, and that says both.
"""

from collections.abc import Callable, Sequence

from vcproxy.backend.protocol import Rejection
from vcproxy.pb import convert, distribution_pb2

# As many as a brain keeps for its status.
MOST_REJECTIONS = 256
LONGEST_TEXT = 512
PATIENCE_SECONDS = 0.1
"""How long `received` waits for `committed`; what takes longer is worth seeing from the brain."""

CallLater = Callable[[float, Callable[[], None]], object]


class Outbox:
    """Messages to be sent, made when they are taken. `wake` is called when there is one.

    `call_later`: as asyncio's.
    """

    def __init__(self, wake: Callable[[], None], call_later: CallLater) -> None:
        self._wake = wake
        self._call_later = call_later
        self._held_back: dict[str, distribution_pb2.NodeMessage] = {}
        self._waiting: dict[tuple[str, str], distribution_pb2.NodeMessage] = {}

    def received(self, uid: str, revision: int, digest: bytes, microseconds: int) -> None:
        """The content was accepted."""
        first = not self._held_back
        self._held_back[uid] = distribution_pb2.NodeMessage(
            ack=distribution_pb2.Ack(
                tenant=uid,
                revision=revision,
                stage=distribution_pb2.RECEIVED,
                digest=digest,
                microseconds=microseconds,
            )
        )
        if first:
            self._call_later(PATIENCE_SECONDS, self._release)

    def committed(
        self, uid: str, revision: int, digest: bytes, rejections: Sequence[Rejection], microseconds: int
    ) -> None:
        """The content is in the kernel, but for `rejections`: all that are in quarantine now."""
        waits = self._held_back.get(uid)
        if waits is not None and waits.ack.revision <= revision:
            del self._held_back[uid]
        self._put(
            (uid, "committed"),
            distribution_pb2.Ack(
                tenant=uid,
                revision=revision,
                stage=distribution_pb2.COMMITTED,
                digest=digest,
                microseconds=microseconds,
                rejections=[
                    distribution_pb2.Rejection(key=convert.encode_key(r.key), reason=r.reason[:LONGEST_TEXT])
                    for r in rejections[:MOST_REJECTIONS]
                ],
            ),
        )

    def failed(self, uid: str, revision: int, error: str) -> None:
        """The content could not be accepted or programmed."""
        self._put(
            (uid, "error"), distribution_pb2.Ack(tenant=uid, revision=revision, error=error[:LONGEST_TEXT] or "failed")
        )

    def holds(self, known: distribution_pb2.Known) -> None:
        """The brain asked what is held."""
        self._waiting[known.tenant, "known"] = distribution_pb2.NodeMessage(known=known)
        self._wake()

    def ask(self, uid: str) -> None:
        """Have the tenant offered anew."""
        self._waiting[uid, "ask"] = distribution_pb2.NodeMessage(subscribe=distribution_pb2.Subscribe(tenant=uid))
        self._wake()

    def refresh(self, uid: str) -> None:
        """What is held is wrong: send a snapshot."""
        self._waiting[uid, "refresh"] = distribution_pb2.NodeMessage(
            subscribe=distribution_pb2.Subscribe(tenant=uid, refresh=True)
        )
        self._wake()

    def take(self) -> bytes | None:
        """The message that has waited longest, None if there is none."""
        if not self._waiting:
            return None
        key = next(iter(self._waiting))
        return self._waiting.pop(key).SerializeToString()

    def clear(self) -> None:
        """The stream is over: all this was meant for it."""
        self._waiting.clear()
        self._held_back.clear()

    def _release(self) -> None:
        """Say what has waited long enough; some of it not as long, since one timer serves all."""
        held, self._held_back = self._held_back, {}
        for uid, message in held.items():
            self._waiting[uid, "received"] = message
        if held:
            self._wake()

    def _put(self, key: tuple[str, str], ack: distribution_pb2.Ack) -> None:
        self._waiting[key] = distribution_pb2.NodeMessage(ack=ack)
        self._wake()
