"""What a follower of an API server does when a node turns out to be ahead of it (see chronicle): wait, then list."""

import asyncio
import time
from collections.abc import Callable
from typing import NoReturn

from vcproxy.brain.chronicle import Chronicle
from vcproxy.model.mark import Mark

OVERTAKEN_SECONDS = 1.0
"""How long a node may be ahead before lists are asked for: a watch that lags by less catches up alone."""


class Overtaking:
    """Finds out what is true when a node is ahead. `await run()` within a TaskGroup.

    `chronicle`: the follower's; `mark`: where it is now; `announce`: have the streams of nodes look again;
    `relist`: begin to list everything; `apart`: seconds between two times that it is asked to.
    """

    def __init__(
        self,
        *,
        chronicle: Chronicle,
        mark: Callable[[], Mark],
        announce: Callable[[], None],
        relist: Callable[[], None],
        apart: float,
    ) -> None:
        self._chronicle, self._mark = chronicle, mark
        self._announce, self._relist = announce, relist
        self._apart = apart
        self._listed_at = -apart
        self._ahead = asyncio.Event()

    def told(self, by: Mark) -> None:
        """A node holds what may be newer in these kinds."""
        if self._chronicle.overtaken(by):
            self._ahead.set()

    def reached(self, mark: Mark) -> None:
        """The follower is there now: say so, if no node is ahead any more and one was."""
        if self._chronicle.asked and not self._chronicle.behind(mark):
            self._announce()

    async def run(self) -> NoReturn:
        """For ever."""
        while True:
            await self._ahead.wait()
            self._ahead.clear()
            await asyncio.sleep(OVERTAKEN_SECONDS)
            await asyncio.sleep(self._listed_at + self._apart - time.monotonic())
            if self._chronicle.behind(self._mark()):
                self._listed_at = time.monotonic()
                self._relist()
            else:
                self._announce()
