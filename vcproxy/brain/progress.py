"""How far one node is with one tenant: sent, received, committed. What `status` shows, and where its lag comes from."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from vcproxy.backend.protocol import Rejection
from vcproxy.brain.encoding import Version
from vcproxy.pb import convert, distribution_pb2

MOST_REJECTIONS = 256
MOST_UNCOMMITTED = 64
LONGEST_REASON = 512


class TenantStatus(msgspec.Struct, frozen=True):
    """One tenant on one node. Revisions are this brain's, 0 for none yet.

    `current`: the node committed the content that the brain has now, whatever its revision number. `lag_seconds`: age
    of the oldest content that was sent and is not committed, 0 for none. `commit_microseconds`: what the last commit
    cost the node. `rejections`: service ports in quarantine after it. `error`: why the last one failed, "" if it did
    not. `behind`: why nothing is sent, since the node may have newer content than this brain; "" otherwise.
    """

    uid: str
    name: str
    sent: int
    received: int
    committed: int
    current: bool
    lag_seconds: float
    commit_microseconds: int
    rejections: tuple[Rejection, ...]
    error: str
    behind: str = ""


class NodeStatus(msgspec.Struct, frozen=True):
    """One stream of one node. `connected_since`: Unix seconds. `tenants`: those placed on it that the brain serves.

    `stream`: its kind (see stream).
    """

    node: str
    peer: str
    agent: str
    connected_since: float
    tenants: tuple[TenantStatus, ...]
    stream: str = "whole"


class _Sent(NamedTuple):
    version: Version
    at: float


class Progress:
    """Of one tenant on one stream. `clock` is monotonic, in seconds.

    What is kept of contents in flight is bounded: when a node falls far behind, the oldest (which tells the lag) and
    the newest stay.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._uncommitted: deque[_Sent] = deque()
        self._last_sent: Version | None = None
        self._received = 0
        self._committed: Version | None = None
        self._microseconds = 0
        self._rejections: tuple[Rejection, ...] = ()
        self._error = ""

    def sent(self, version: Version) -> None:
        """The stream took the last octet of this content."""
        self._last_sent = version
        if len(self._uncommitted) == MOST_UNCOMMITTED:
            self._uncommitted.pop()
        self._uncommitted.append(_Sent(version, self._clock()))

    def acknowledged(self, ack: distribution_pb2.Ack) -> None:
        """The node said so. Raises MalformedModel."""
        if ack.error:
            self._error = ack.error[:LONGEST_REASON]
            return
        version = Version(ack.revision, convert.decode_digest(ack.tenant, ack.digest))
        if ack.stage == distribution_pb2.RECEIVED:
            self._received = max(self._received, version.revision)
        elif ack.stage == distribution_pb2.COMMITTED:
            self._committed = version
            self._received = max(self._received, version.revision)
            self._microseconds = ack.microseconds
            self._rejections = _rejections(ack.tenant, ack.rejections)
            self._error = ""
            while self._uncommitted and self._uncommitted[0].version.revision <= version.revision:
                self._uncommitted.popleft()

    def status(self, uid: str, name: str, newest: Version, behind: str = "") -> TenantStatus:
        """As of now; `newest` is what the brain has."""
        committed = self._committed
        return TenantStatus(
            uid=uid,
            name=name,
            sent=self._last_sent.revision if self._last_sent else 0,
            received=self._received,
            committed=committed.revision if committed else 0,
            current=committed is not None and committed.digest == newest.digest,
            lag_seconds=self._clock() - self._uncommitted[0].at if self._uncommitted else 0.0,
            commit_microseconds=self._microseconds,
            rejections=self._rejections,
            error=self._error,
            behind=behind,
        )


def _rejections(uid: str, messages: Sequence[distribution_pb2.Rejection]) -> tuple[Rejection, ...]:
    return tuple(
        Rejection(convert.decode_key(uid, message.key), message.reason[:LONGEST_REASON])
        for message in messages[:MOST_REJECTIONS]
    )
