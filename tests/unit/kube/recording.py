"""A sink for a reflector's events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from vcproxy.kube.reflector import Event


class Recorder:
    """A sink that remembers; `until` waits for what a test expects."""

    def __init__(self) -> None:
        self.events: list[Event[Any]] = []
        self._more = asyncio.Event()

    def __call__(self, event: Event[Any]) -> None:
        self.events.append(event)
        self._more.set()

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    async def until(self, condition: Callable[[], bool], *, deadline: float = 10) -> None:
        async with asyncio.timeout(deadline):
            while not condition():
                self._more.clear()
                await self._more.wait()
