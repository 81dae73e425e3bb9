"""The recent revisions of one tenant as encoded steps, found by the digest of the content they start from.

By digest, not by number: a node that comes from another replica, or from this brain before its restart, says what it
holds, and if any recent content here was the same, the steps from there on are all it needs.

A ring, bounded by number and by octets; the octets allowed grow with the tenant, because steps are worth keeping until
a snapshot is cheaper. When a content recurs (a rollback), the newest occurrence wins: the shortest way.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from vcproxy.brain.encoding import CHUNK_OCTETS, Version, encode_delta, encode_operations, operations_bound
from vcproxy.model.tenant import Operation
from vcproxy.model.timing import Timing

LARGEST_STEP = 4 << 20
"""Octets of one revision, which is one message: well below what a node is ready to receive."""


class Step(NamedTuple):
    """One revision: from which content to which, and its operations as fields of a Delta."""

    before: Version
    after: Version
    operations: bytes
    timing: Timing | None
    start: int  # octets of all steps ever recorded before this one


class Delta(NamedTuple):
    """A BrainMessage ready to be sent, and what the receiver holds after it."""

    message: bytes
    after: Version
    timing: Timing | None


class History:
    """The ring of one tenant. `count`: most steps kept."""

    def __init__(self, uid: str, *, count: int) -> None:
        self._uid = uid
        self._count = count
        self._steps: deque[Step] = deque()
        self._first = 0  # number of the oldest step kept, of all ever recorded
        self._by_digest: dict[bytes, int] = {}
        self._end = 0  # octets of all steps ever recorded
        self._made: dict[bytes, Delta] = {}

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def octets(self) -> int:
        """Of the operations kept."""
        return self._end - self._steps[0].start if self._steps else 0

    def record(
        self, before: Version, after: Version, operations: Sequence[Operation], timing: Timing | None, *, room: int
    ) -> None:
        """Add the newest revision. Steps beyond `room` octets are dropped, all of them if this one alone is larger."""
        self._made.clear()
        if operations_bound(operations) > min(room, LARGEST_STEP):
            self.clear()
            return
        encoded = encode_operations(operations)
        self._by_digest[before.digest] = self._first + len(self._steps)
        self._steps.append(Step(before, after, encoded, timing, self._end))
        self._end += len(encoded)
        while len(self._steps) > self._count or self.octets > room:
            dropped = self._steps.popleft()
            if self._by_digest[dropped.before.digest] == self._first:
                del self._by_digest[dropped.before.digest]
            self._first += 1

    def clear(self) -> None:
        """Forget all steps: from now on who is behind takes a snapshot."""
        self._first += len(self._steps)
        self._steps.clear()
        self._by_digest.clear()
        self._made.clear()

    def distance(self, digest: bytes) -> int | None:
        """Octets of operations from that content to the newest, None if there is no such way."""
        number = self._by_digest.get(digest)
        return self._end - self._steps[number - self._first].start if number is not None else None

    def since(self, digest: bytes) -> list[bytes] | None:
        """The operations from that content to the newest, a step each, None if there is no such way."""
        number = self._by_digest.get(digest)
        if number is None:
            return None
        return [step.operations for step in itertools.islice(self._steps, number - self._first, None)]

    def delta(self, digest: bytes) -> Delta | None:
        """The next message for a receiver of that content, None if there is no way from there.

        It brings the newest content, or, where that would exceed CHUNK_OCTETS, an earlier revision: ask again from
        `Delta.after`. The same bytes for every receiver that asks before the next revision.
        """
        made = self._made.get(digest)
        if made is None:
            number = self._by_digest.get(digest)
            if number is None:
                return None
            made = self._made[digest] = self._make(number - self._first)
        return made

    def _make(self, at: int) -> Delta:
        first = self._steps[at]
        taken = [first]
        for index in range(at + 1, len(self._steps)):
            step = self._steps[index]
            if step.start + len(step.operations) - first.start > CHUNK_OCTETS:
                break
            taken.append(step)
        after = taken[-1].after
        timing = _oldest([step.timing for step in taken])
        message = encode_delta(self._uid, first.before, after, [step.operations for step in taken], timing)
        return Delta(message, after, timing)


def _oldest(timings: Sequence[Timing | None]) -> Timing | None:
    """Of each stage the oldest known time."""
    known = [timing for timing in timings if timing is not None]
    if not known:
        return None
    return Timing(
        event=min((t.event for t in known if t.event), default=0),
        received=min((t.received for t in known if t.received), default=0),
        compiled=min((t.compiled for t in known if t.compiled), default=0),
    )
