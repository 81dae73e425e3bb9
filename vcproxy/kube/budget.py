"""How fast one tenant may use up what all share: a token bucket (ITU-T I.371's leaky bucket, as a meter)."""

from __future__ import annotations


class Budget:
    """`rate` units a second, of which at most `saved` are kept for later; `now`: the time in seconds as it begins."""

    def __init__(self, rate: float, saved: float, now: float) -> None:
        self._rate, self._most = rate, saved
        self._left, self._last = saved, now

    def spend(self, units: float, now: float) -> float:
        """Use up so many units, be they there or not; returns how many seconds to wait until there are any again."""
        self._left = min(self._most, self._left + (now - self._last) * self._rate) - units
        self._last = now
        return max(0.0, -self._left / self._rate)
