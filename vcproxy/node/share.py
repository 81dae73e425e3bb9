"""What a node does with a content stream: one of several, from brains that share tenants.

As `receiver`, but for what such a stream may say. Contents are taken of tenants that it feeds (see offers); the node's
facts, its pods and which tenants are to be removed are the leading stream's to say, and not heard here. When a tenant
is offered the node says what it holds of it now, which another stream may have brought.
"""

from typing import Any

from vcproxy.node.offers import Offerer, Offers
from vcproxy.node.receiver import ProtocolError, Receiver, known
from vcproxy.pb import convert, distribution_pb2, features

_OF_A_TENANT = ("added", "snapshot", "delta", "synced", "stale", "behind", "released")


class Redundant(ProtocolError):
    """Another stream to the same brain stands."""


class ShareReceiver(Receiver):
    """The receiver of one content stream, `by`."""

    def __init__(self, *, offers: Offers, by: Offerer, **how: Any) -> None:
        super().__init__(**how)
        self._offers = offers
        self._by = by

    def start(self, node: str, agent: str) -> bytes:
        """A stream begins. Returns the Hello."""
        self.stop()
        hello = distribution_pb2.Hello(
            node=node, agent=agent, features=(features.BATCH, features.SHARDS, features.CONTENT)
        )
        return distribution_pb2.NodeMessage(hello=hello).SerializeToString()

    def stop(self) -> None:
        """The stream is over."""
        super().stop()
        self._offers.closed(self._by)

    def _welcome(self, message: distribution_pb2.Welcome) -> None:
        if features.CONTENT not in message.features:
            raise ProtocolError("this brain's version knows nothing of shards")
        if not self._offers.enter(message.brain, self._by):
            raise Redundant("another address leads to the same brain")
        self._begin(message.brain)

    def _heeds(self, kind: str | None, uid: str) -> bool:
        if kind == "welcome" or kind == "added":
            return True
        return kind in _OF_A_TENANT and self._offers.feeder(uid) is self._by

    def _added(self, message: distribution_pb2.TenantAdded) -> None:
        uid = convert.decode_uid(message.tenant)
        if not message.asks:
            if self._offers.feeder(uid) is self._by:
                super()._added(message)
            return
        self._offers.offered(uid, self._by)
        self._settled(uid)
        super()._added(message)
        held = self._holdings.tenants[uid]
        self._set_behind(held, "")
        self._floors[uid] = held.mark
        self._outbox.holds(known(held))

    def _released(self, uid: str) -> None:
        self._settled(uid)
        self._floors.pop(uid, None)
        self._brain_at.pop(uid, None)
        held = self._holdings.get(uid)
        if held is not None:
            self._set_behind(held, "")
        self._offers.released(uid, self._by)
