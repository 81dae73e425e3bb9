"""When to try again.

Full-jitter exponential backoff, after "Exponential Backoff And Jitter" (AWS, 2015), with a floor of half the step: an
API server that comes back is met by a thousand reflectors spread over the whole interval, and none of them comes at
once.
"""

from __future__ import annotations

from collections.abc import Callable


class Backoff:
    """Delays in seconds that double from `base` to `cap`, each drawn between half of its step and the whole.

    `uniform(a, b)` is the source of randomness (`random.uniform`).
    """

    def __init__(self, *, base: float, cap: float, uniform: Callable[[float, float], float]) -> None:
        self._base, self._cap, self._uniform = base, cap, uniform
        self._failures = 0

    def next(self, *, at_least: float | None = None) -> float:
        """The delay before the next attempt; `at_least` is what the server asked for (Retry-After)."""
        step = min(self._cap, self._base * 2 ** min(self._failures, 32))
        self._failures += 1
        return max(self._uniform(step / 2, step), at_least or 0.0)

    def reset(self) -> None:
        """All was well for a while: the next delay is a short one again."""
        self._failures = 0
