"""The tenants' feeds shared out among brains: the election's I/O, and what the rest of the brain asks of it.

The loop is that of `election`: list, decide, write, rest a little. Two sets come of it. *Held* are the shards that are
this brain's beyond doubt: nodes are told of their tenants. *Kept* are those whose Leases, when last seen, named this
brain: their tenants are followed, so that a super cluster whose API server was away for a minute does not cost the
reading of every tenant anew. A shard that cannot be renewed leaves *held* by a timer, before anybody else can have it;
it leaves *kept* when another brain is seen to have it, or when it is given back.

A brain takes part once it knows all tenants and where pods run. One that does not (a source that it cannot read) would
hold shards of which it can feed nothing.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from vcproxy.brain.election import Election, Lease, Step, Timing, shard_of
from vcproxy.kube.errors import ApiError, Conflict, KubeconfigError, NotFound
from vcproxy.ops import logs, metrics

LEAVE_SECONDS = 3.0
"""How long a brain that ends tries to give its shards back."""

_log = logs.get("sharding")
_CURE = "allow list, create, update and delete on leases.coordination.k8s.io: see deploy/brain.yaml"


class Leases(Protocol):
    """Where Leases are; leases.LeaseClient."""

    async def list(self) -> list[Lease]:
        """All there are. Raises ApiError, KubeconfigError."""

    async def do(self, step: Step) -> Lease | None:
        """Do a step. Raises ApiError, KubeconfigError."""

    async def close(self) -> None:
        """Close all connections."""


class Share(Protocol):
    """Which tenants are this brain's; sharding.Sharding."""

    def holds(self, uid: str) -> bool:
        """Whether nodes are to be told of it by this brain."""

    def keeps(self, uid: str) -> bool:
        """Whether it is to be followed."""


class Everything:
    """All are."""

    def holds(self, uid: str) -> bool:
        """Yes."""
        return True

    def keeps(self, uid: str) -> bool:
        """Yes."""
        return True


class Sharding:
    """This brain's part; `await run()` within a TaskGroup. `me`: its name among brains.

    `ready`: whether it may take part. `changed` is called when `held` or `kept` did.
    """

    def __init__(
        self,
        leases: Leases,
        *,
        me: str,
        shards: int,
        timing: Timing,
        ready: Callable[[], bool],
        changed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.me = me
        self.shards = shards
        self.held: frozenset[int] = frozenset()
        self.kept: frozenset[int] = frozenset()
        self.problem = ""
        self._leases = leases
        self._timing = timing
        self._election = Election(me, shards, timing)
        self._ready = ready
        self._changed = changed
        self._clock = clock
        self._failed = ""
        self._timer: asyncio.TimerHandle | None = None

    def holds(self, uid: str) -> bool:
        """Whether nodes are to be told of the tenant by this brain."""
        return shard_of(uid, self.shards) in self.held

    def keeps(self, uid: str) -> bool:
        """Whether the tenant is to be followed."""
        return shard_of(uid, self.shards) in self.kept

    def status(self) -> dict[str, Any]:
        """For people: who holds what."""
        now = self._clock()
        holders = self._election.holders(now)
        return {
            "brain": self.me,
            "shards": self.shards,
            "held": sorted(self.held),
            "kept": sorted(self.kept),
            "brains": {name: _of(holders, name) for name in sorted(self._election.members(now))},
            "nobodys": _of(holders, ""),
        }

    async def run(self) -> NoReturn:
        """Take part for ever. At the end all is given back."""
        try:
            while True:
                if self._ready():
                    await self._round()
                await asyncio.sleep(self._timing.retry * random.uniform(0.8, 1.2))
        finally:
            if self._timer is not None:
                self._timer.cancel()
            await self._leave()
            await self._leases.close()

    async def _round(self) -> None:
        self._failed = ""
        try:
            self._election.listed(await self._leases.list(), self._clock())
        except (ApiError, KubeconfigError) as error:
            self._failed = f"Leases cannot be listed: {error}; {_CURE}"
        else:
            steps = self._election.plan(self._clock())
            self._settle()  # what is given back is not fed when others may take it
            await self._do_all(steps)
            self._settle()
        if self._failed and not self.problem:
            _log.warning("shards may be lost", problem=self._failed, held=len(self.held))
        self.problem = self._failed

    async def _do_all(self, steps: Sequence[Step]) -> None:
        async with asyncio.TaskGroup() as group:
            for step in steps:
                group.create_task(self._do(step))

    async def _do(self, step: Step) -> None:
        sent = self._clock()
        try:
            after = await self._leases.do(step)
        except (ApiError, KubeconfigError) as error:
            if isinstance(error, Conflict) or (isinstance(error, NotFound) and step.before is not None):
                return  # another was faster; the next list tells
            self._failed = f"a Lease cannot be written: {error}; {_CURE}"
        else:
            self._election.written(step, after, sent=sent, now=self._clock())

    def _settle(self) -> None:
        """See what is held now, and look again when that will be less."""
        now = self._clock()
        if self._timer is not None:
            self._timer.cancel()
        expiry = self._election.next_expiry(now)
        self._timer = None
        if expiry is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, expiry - now) + 0.001, self._settle)
        self._show(self._election.held(now), self._election.kept())

    def _show(self, held: frozenset[int], kept: frozenset[int]) -> None:
        before, was_kept = self.held, self.kept
        if (held, kept) == (before, was_kept):
            return
        self.held, self.kept = held, kept
        if taken := held - before:
            _log.info("shards taken", taken=sorted(taken), held=len(held), of=self.shards)
            metrics.SHARD_MOVES.labels("taken").inc(len(taken))
        if ended := before - held:
            waits = ended & kept
            why = "its Leases cannot be renewed" if waits else "given back, or another brain's"
            _log.log(30 if waits else 20, "shards are fed no longer", shards=sorted(ended), why=why, held=len(held))
            metrics.SHARD_MOVES.labels("ended").inc(len(ended))
        metrics.SHARDS.labels("held").set(len(held))
        metrics.SHARDS.labels("kept").set(len(kept))
        self._changed()

    async def _leave(self) -> None:
        """Give everything back: who ends in good order is not to be waited for."""
        if not self._ready():
            return
        with contextlib.suppress(TimeoutError, ApiError, KubeconfigError):
            async with asyncio.timeout(LEAVE_SECONDS):
                # A write that the end has cut off may have been done: what was last seen would be refused.
                self._election.listed(await self._leases.list(), self._clock())
                steps = self._election.leave()
                await self._do_all(steps)
                _log.info("shards given back", shards=sum(isinstance(step.key, int) for step in steps))


def _of(holders: Mapping[int, str], name: str) -> list[int]:
    return [shard for shard, holder in sorted(holders.items()) if holder == name]
