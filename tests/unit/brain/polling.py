"""Waiting in tests: for something to become true, with a deadline, never for a fixed time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any


async def until(condition: Callable[[], Any], *, timeout: float = 10.0) -> Any:
    """Polls until `condition` returns something true, and returns it. Fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"still not true after {timeout} s")
        await asyncio.sleep(0.005)
    return found


async def settle(turns: int = 20) -> None:
    """Lets everything that is ready run: `turns` rounds of the event loop."""
    for _ in range(turns):
        await asyncio.sleep(0)
