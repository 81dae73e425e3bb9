"""What is still to do, per tenant: coalesced, fair, and with a backoff that is each tenant's own. Sans-I/O, no clock.

There is no queue of events: a tenant has at most one task, and a change while it waits only adds to what the task will
read from the holdings when its turn comes. Tasks run in the order in which they became due, one turn each, so a tenant
that changes all the time gets every n-th turn of n busy ones. A task that failed waits for its backoff alone; whatever
changes meanwhile joins it. Times are seconds of any one clock, given by the caller.
"""

from collections.abc import Collection, Iterator

import msgspec

from vcproxy.model.services import PortKey
from vcproxy.model.timing import Timing

FIRST_RETRY = 0.05
LONGEST_RETRY = 5.0


class Task(msgspec.Struct):
    """What one tenant needs: `remove` all of it; or program `everything`; or the ports of `keys` (none: facts only).

    `queued_at`: when the oldest change in it was queued. `attempts`: how often it failed in a row. `timing`: of the
    oldest change whose times are known.
    """

    queued_at: float
    everything: bool = False
    keys: set[PortKey] = msgspec.field(default_factory=set)
    remove: bool = False
    attempts: int = 0
    timing: Timing | None = None

    def absorb(self, newer: "Task") -> None:
        """Become both tasks in one; of `remove` and its contrary the newer counts."""
        if newer.remove or self.remove:
            # What comes after a removal starts from nothing, and a removal makes all before it pointless.
            self.everything, self.keys, self.timing = not newer.remove, set(), newer.timing
            self.remove = newer.remove
        else:
            self.everything = self.everything or newer.everything
            self.keys = set() if self.everything else self.keys | newer.keys
            self.timing = _older(self.timing, newer.timing)
        self.queued_at = min(self.queued_at, newer.queued_at)


class Pending:
    """Tasks by name (a tenant's uid). Every operation costs the same whatever waits, but for tasks in backoff."""

    def __init__(self, *, first_retry: float = FIRST_RETRY, longest_retry: float = LONGEST_RETRY) -> None:
        self._first_retry = first_retry
        self._longest_retry = longest_retry
        self._due: dict[str, Task] = {}
        self._backing_off: dict[str, tuple[float, Task]] = {}
        self._scheduled: dict[str, tuple[float, Task]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._due or name in self._backing_off

    def add(self, name: str, task: Task) -> None:
        """Something is to do for `name`: now, or when the backoff that it is in ends."""
        waiting = self._backing_off.get(name)
        held = waiting[1] if waiting else self._due.get(name)
        if held is None:
            self._due[name] = task
        else:
            held.absorb(task)

    def schedule(self, name: str, task: Task, at: float) -> None:
        """Like `add`, but not before `at`. In place of what was scheduled for `name` before."""
        self._scheduled[name] = (at, task)

    def take(self, now: float) -> tuple[str, Task] | None:
        """The task whose turn it is, which the caller now owns; None if nothing is due."""
        if self._backing_off or self._scheduled:
            self._wake(now)
        for name in self._due:
            return name, self._due.pop(name)
        return None

    def failed(self, name: str, task: Task, now: float) -> float:
        """Give back a task that could not be done, to be tried again later; returns in how many seconds."""
        newer = self._due.pop(name, None)
        if newer is not None:
            task.absorb(newer)
        delay = min(self._first_retry * 2.0 ** min(task.attempts, 32), self._longest_retry)
        task.attempts += 1
        self._backing_off[name] = (now + delay, task)
        return delay

    def discard(self, name: str) -> None:
        """Nothing is to do for `name` any more."""
        self._due.pop(name, None)
        self._backing_off.pop(name, None)
        self._scheduled.pop(name, None)

    def next_at(self) -> float | None:
        """When `take` may give something at the latest without a further `add`; None: never. 0 if it would now."""
        if self._due:
            return 0.0
        return min((at for at, _ in (*self._backing_off.values(), *self._scheduled.values())), default=None)

    def waiting(self) -> Iterator[tuple[str, Task]]:
        """All tasks that are due or in backoff, for status and health; not what is merely scheduled."""
        yield from self._due.items()
        for name, (_, task) in self._backing_off.items():
            yield name, task

    def _wake(self, now: float) -> None:
        for name in [name for name, (at, _) in self._backing_off.items() if at <= now]:
            self._due[name] = self._backing_off.pop(name)[1]
        for name in [name for name, (at, _) in self._scheduled.items() if at <= now]:
            self.add(name, self._scheduled.pop(name)[1])


def changed(keys: Collection[PortKey] | None, now: float, timing: Timing | None = None) -> Task:
    """The task after a change of these ports; None: of everything."""
    return Task(queued_at=now, everything=keys is None, keys=set(keys or ()), timing=timing)


def removal(now: float) -> Task:
    """The task to remove a tenant."""
    return Task(queued_at=now, remove=True)


def _older(one: Timing | None, other: Timing | None) -> Timing | None:
    if one is None or other is None:
        return one or other
    return one if (one.event or one.received) <= (other.event or other.received) else other
