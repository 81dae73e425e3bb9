"""How many nodes are sent snapshots at a time, so that the first are done early rather than all of them late.

A slot is leased, not owned: the lease is renewed with every part that the node takes, and a node that stops reading
loses it to the next in line. It asks again when it reads on: nobody is dropped for being slow, nobody slow holds up
others.
"""

import asyncio
from collections import deque
from collections.abc import Callable


class Ticket:
    """A place in the queue (`queued`), then a slot (`held`), then neither."""

    def __init__(self, admission: "Admission", granted: Callable[[], None]) -> None:
        self.queued = True
        self.held = False
        self._admission = admission
        self._granted = granted
        self._timer: asyncio.TimerHandle | None = None

    def renew(self) -> None:
        """The slot was made use of: its lease starts anew."""
        assert self.held
        self._stop()
        self._timer = asyncio.get_running_loop().call_later(self._admission.lease, self.release)

    def release(self) -> None:
        """Give up the slot, or the place in the queue. Doing so again is no error."""
        self._stop()
        self._admission.released(self)

    def grant(self) -> None:
        """For the admission: this ticket is a slot now."""
        self.queued, self.held = False, True
        self.renew()
        self._granted()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Admission:
    """`slots` snapshots at a time; `lease`: seconds after which an unused slot goes to the next in line."""

    def __init__(self, *, slots: int, lease: float) -> None:
        self.lease = lease
        self._free = slots
        self._queue: deque[Ticket] = deque()

    def ask(self, granted: Callable[[], None]) -> Ticket:
        """A ticket, held at once if a slot is free. `granted` is called when it is held, which may be in this call."""
        ticket = Ticket(self, granted)
        if self._free:
            self._free -= 1
            ticket.grant()
        else:
            self._queue.append(ticket)
        return ticket

    def released(self, ticket: Ticket) -> None:
        """For the ticket."""
        if ticket.queued:
            ticket.queued = False
            self._queue.remove(ticket)
        if not ticket.held:
            return
        ticket.held = False
        if self._queue:
            self._queue.popleft().grant()
        else:
            self._free += 1
