"""A deadline for silence: one timer as long as all is well, however often something is heard.

`asyncio.timeout` around each step costs a timer each time: some 8 % of a brain's time at 1,000 events a second.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Patience:
    """Lets `timeout` end when nothing was heard for `seconds`."""

    def __init__(self, timeout: asyncio.Timeout, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout = timeout
        self._seconds = seconds
        self._until = self._loop.time() + seconds
        self._timer = self._loop.call_at(self._until, self._look)

    def heard(self, busy: float = 0.0) -> None:
        """Something was heard, and for so many seconds nobody will listen."""
        self._until = self._loop.time() + busy + self._seconds

    def _look(self) -> None:
        if self._loop.time() < self._until:
            self._timer = self._loop.call_at(self._until, self._look)
        else:
            self._timeout.reschedule(self._until)

    def close(self) -> None:
        """No more deadlines."""
        self._timer.cancel()


@asynccontextmanager
async def patience(seconds: float) -> AsyncIterator[Patience]:
    """Raises TimeoutError once nothing was `heard` for so long. A deadline around each step, not around octets: who
    drips a line for ever is as silent as who says nothing.
    """
    async with asyncio.timeout(None) as timeout:
        patient = Patience(timeout, seconds)
        try:
            yield patient
        finally:
            patient.close()
