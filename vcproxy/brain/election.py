"""Which brain feeds which shard: the decisions, without I/O and without a clock of its own.

Each shard has a Lease, and each brain one that says that it lives. A brain does three things again and again: it lists
all Leases, hands them over (`listed`), and does what `plan` says, telling what came of it (`written`). All that brains
know of each other is in those lists, and each decides for itself.

*At most one.* A holder believes in its shard until `renew_seconds` after it *sent* the last write that succeeded. Who
wants a shard of somebody else's must have seen its Lease unchanged for the Lease's own duration, counted from when it
*received* a list, and writes under the condition that it still is. The duration is longer than `renew_seconds`, so the
holder has given up by then, whatever became of its connection. Only monotonic clocks count, each brain's own; the times
in a Lease are for people.

*Evenly.* With the same list all live brains compute the same targets: the shards divided by the number of brains, the
remainder to those that hold most already, so that it does not move. A brain takes free shards up to its target and
gives back what is above it, half of it at a time: while some shards are between brains, others are fed. Which ones it
prefers is a hash of its name and the shard's number, so that two brains seldom reach for the same.

*Unanswered.* A write without an answer may have been done. The next list tells: what names this brain is its own, to be
renewed or given back.
"""

import enum
import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

Key = int | str
"""A shard's number; of a brain's own Lease the brain's name."""


class Timing(NamedTuple):
    """Seconds, as in client-go's leader election: `lease` > `renew` > `retry`."""

    lease: int = 15
    renew: float = 10.0
    retry: float = 2.0


class Lease(NamedTuple):
    """A Lease as the API server has it. `holder` "": free. `seconds`: for how long it counts when it is not changed."""

    key: Key
    holder: str
    version: str
    seconds: float
    transitions: int = 0
    acquired: str = ""


class Act(enum.Enum):
    """What to do with a Lease."""

    HOLD = enum.auto()
    RELEASE = enum.auto()
    REMOVE = enum.auto()


class Step(NamedTuple):
    """Do this, on the condition that the Lease still is `before` (None: that there is none)."""

    act: Act
    key: Key
    before: Lease | None


class Election:
    """What one brain, `me`, knows and believes. `now` is always this process's monotonic clock, in seconds."""

    def __init__(self, me: str, shards: int, timing: Timing) -> None:
        self._me = me
        self._timing = timing
        self._shards = range(shards)
        self._leases: dict[Key, Lease] = {}
        self._since: dict[Key, float] = {}  # when the Lease as it is was first seen
        self._until: dict[int, float] = {}  # how long a shard is believed in
        self._given: set[int] = set()  # back, or about to be
        self._member = False
        self._preferred = sorted(self._shards, key=lambda shard: _hash(f"{me}/{shard}"))

    # --- what is believed ---------------------------------------------------------------------------------------------

    def held(self, now: float) -> frozenset[int]:
        """Shards that are this brain's beyond doubt."""
        return frozenset(shard for shard, until in self._until.items() if now < until)

    def kept(self) -> frozenset[int]:
        """Shards whose Lease still named this brain when it was last seen, and that it does not give back."""
        return frozenset(self._mine()) - self._given

    def next_expiry(self, now: float) -> float | None:
        """When `held` will be less than it is now, if no write succeeds until then."""
        return min((until for until in self._until.values() if now < until), default=None)

    def members(self, now: float) -> frozenset[str]:
        """Brains that live, this one included once it has said so."""
        live = (key for key, lease in self._leases.items() if isinstance(key, str) and self._counts(lease, now))
        return frozenset(live)

    def holders(self, now: float) -> dict[int, str]:
        """Who holds each shard, as last seen; "": nobody."""
        leases = {shard: self._leases.get(shard) for shard in self._shards}
        return {
            shard: lease.holder if lease is not None and self._counts(lease, now) else ""
            for shard, lease in leases.items()
        }

    # --- what happened ------------------------------------------------------------------------------------------------

    def listed(self, leases: Iterable[Lease], now: float) -> None:
        """All Leases there are; `now`: when the answer was there."""
        before, self._leases = self._leases, {lease.key: lease for lease in leases}
        for key, lease in self._leases.items():
            old = before.get(key)
            if old is None or old.version != lease.version:
                self._since[key] = now
        for key in self._since.keys() - self._leases.keys():
            del self._since[key]
        mine = set(self._mine())
        self._until = {shard: until for shard, until in self._until.items() if shard in mine}
        self._given &= mine

    def written(self, step: Step, after: Lease | None, *, sent: float, now: float) -> None:
        """A step was done, and the Lease is `after` (None: gone)."""
        if after is None:
            self._leases.pop(step.key, None)
            self._since.pop(step.key, None)
            return
        self._leases[step.key], self._since[step.key] = after, now
        if step.act is Act.HOLD and isinstance(step.key, int):
            self._until[step.key] = sent + self._timing.renew

    # --- what is to be done -------------------------------------------------------------------------------------------

    def plan(self, now: float) -> list[Step]:
        """What to do after a list. What is given back is no longer held when this returns.

        A brain that is new only says that it is there: those that start with it then see each other before they take.
        """
        steps = [Step(Act.HOLD, self._me, self._leases.get(self._me))]
        steps += [Step(Act.REMOVE, lease.key, lease) for lease in self._dead(now)]
        if not self._member:
            self._member = self._me in self._leases
        if not self._member:
            return steps
        mine, target = self._mine(), self._target(now)
        surplus = len(mine) - target
        self._give(mine[-((surplus + 1) // 2) :] if surplus > 0 else [])
        back = [shard for shard in mine if shard in self._given]
        steps += [Step(Act.RELEASE, shard, self._leases[shard]) for shard in back]
        steps += [Step(Act.HOLD, shard, self._leases[shard]) for shard in mine if shard not in self._given]
        free = [shard for shard in self._preferred if self._free(shard, now)]
        steps += [Step(Act.HOLD, shard, self._leases.get(shard)) for shard in free[: max(0, target - len(mine))]]
        return steps

    def leave(self) -> list[Step]:
        """Give everything back, and say that this brain is gone."""
        mine = self._mine()
        self._give(mine)
        steps = [Step(Act.RELEASE, shard, self._leases[shard]) for shard in mine]
        own = self._leases.get(self._me)
        return [*steps, Step(Act.REMOVE, self._me, own)] if own is not None else steps

    # --- details ------------------------------------------------------------------------------------------------------

    def _mine(self) -> list[int]:
        """Those that name this brain, the best liked first."""
        return [
            shard
            for shard in self._preferred
            if (lease := self._leases.get(shard)) is not None and lease.holder == self._me
        ]

    def _give(self, shards: Iterable[int]) -> None:
        """Give these back, and no others, whatever was to be given back before."""
        self._given = set(shards)
        for shard in self._given:
            self._until.pop(shard, None)

    def _target(self, now: float) -> int:
        live = self.members(now) | {self._me}
        holds = Counter(
            lease.holder for key, lease in self._leases.items() if isinstance(key, int) and key in self._shards
        )
        rank = sorted(live, key=lambda name: (-holds[name], name)).index(self._me)
        share, rest = divmod(len(self._shards), len(live))
        return share + (rank < rest)

    def _free(self, shard: int, now: float) -> bool:
        lease = self._leases.get(shard)
        return lease is None or (lease.holder != self._me and not self._counts(lease, now))

    def _counts(self, lease: Lease, now: float) -> bool:
        return bool(lease.holder) and now < self._since[lease.key] + lease.seconds

    def _dead(self, now: float) -> list[Lease]:
        return [
            lease
            for key, lease in self._leases.items()
            if isinstance(key, str) and key != self._me and not self._counts(lease, now)
        ]


def shard_of(uid: str, shards: int) -> int:
    """The shard of a tenant: the same in every brain and every version."""
    return _hash(uid) % shards


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
