"""How many tenants' API servers are listed at a time, in one brain.

A thousand tenants that are all listed at once are all late: each takes a share of one loop, none is done within its
deadlines, and their lists fill the memory together. Listed a few at a time, the first are served after milliseconds,
the last is as soon as it could be, and memory holds a few lists.

One API server has one turn for all its lists. A turn is leased (admission.py): whose API server says nothing for a few
seconds goes on alone, and the next begins. Whoever failed or lost its turn in its last list waits in a line of its own,
with a few turns of its own: tenants whose API servers hang hold up each other, and nobody else.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from vcproxy.brain.admission import Admission, Ticket
from vcproxy.kube.errors import Unserved

SLOTS = 16
"""Enough that the loop is busy while answers travel."""
SLOTS_OF_THE_ILL = 4
LEASE_SECONDS = 3.0


class Turns:
    """The turns of all. `slots`: for API servers that did well or are new; `ill`: for those that did not."""

    def __init__(self, *, slots: int = SLOTS, ill: int = SLOTS_OF_THE_ILL, lease: float = LEASE_SECONDS) -> None:
        self._well = Admission(slots=slots, lease=lease)
        self._ill = Admission(slots=ill, lease=lease)

    def ask(self, granted: Callable[[], None], *, ill: bool) -> Ticket:
        """A place in one of the lines."""
        return (self._ill if ill else self._well).ask(granted)


class Turn:
    """One API server's turn: an async context manager around each of its lists, which may overlap."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._ticket: Ticket | None = None
        self._granted = asyncio.Event()
        self._lists = 0
        self._ill = False

    async def __aenter__(self) -> Self:
        ticket = self._ticket
        if ticket is None or not (ticket.held or ticket.queued):
            self._granted.clear()
            self._ticket = self._turns.ask(self._granted.set, ill=self._ill)
        self._lists += 1
        try:
            await self._granted.wait()
        except BaseException:
            self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = isinstance(error, Exception) and not isinstance(error, Unserved)  # that one is asked in another way
        self._ill = failed or not self._held
        self._leave()

    def renew(self) -> None:
        """The API server has said something."""
        if self._ticket is not None and self._held:
            self._ticket.renew()

    @property
    def _held(self) -> bool:
        return self._ticket is not None and self._ticket.held

    def _leave(self) -> None:
        self._lists -= 1
        if not self._lists and self._ticket is not None:
            self._ticket.release()
