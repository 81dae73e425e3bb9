"""What is told of refusals, of one tenant: counted, logged, handed on; and when.

An endpoint whose Pod is about to be seen is no refusal: Pods and slices come by different ways. So what is refused for
whose it is, is told once it has lasted a while. All else is told at once.
"""

import asyncio
from collections.abc import Callable

from vcproxy.brain.guard import BACKEND_REASONS, Reason, Refusal
from vcproxy.ops import logs, metrics

CONFIRM_SECONDS = 5.0
"""How long the refusal of an endpoint must last."""
LOGGED_REFUSALS = 50
"""Refusals of a tenant that are written to the log; all are counted and shown by `explain`."""

_log = logs.get("feed")


class Notices:
    """`uid`: the tenant's. `stands`: whether something is still refused, None if nobody can say now. `told`: gets each
    refusal, counted already.
    """

    def __init__(
        self,
        uid: str,
        *,
        stands: Callable[[Refusal], bool | None],
        told: Callable[[Refusal], None],
        confirm_seconds: float = CONFIRM_SECONDS,
    ) -> None:
        self._uid = uid
        self._stands = stands
        self._told = told
        self._confirm_seconds = confirm_seconds
        self._confirming: asyncio.TimerHandle | None = None
        self._unconfirmed: dict[Refusal, None] = {}
        self._logged = 0

    def notice(self, refusal: Refusal) -> None:
        """This is refused, and was not before."""
        if refusal.reason not in BACKEND_REASONS:
            self._tell(refusal)
            return
        self._unconfirmed[refusal] = None
        if self._confirming is None:
            self._confirming = asyncio.get_running_loop().call_later(self._confirm_seconds, self._confirm)

    def close(self) -> None:
        """Tell no more of what was not confirmed."""
        if self._confirming is not None:
            self._confirming.cancel()

    def _confirm(self) -> None:
        self._confirming = None
        waiting, self._unconfirmed = self._unconfirmed, {}
        for refusal in waiting:
            match self._stands(refusal):
                case True:
                    self._tell(refusal)
                case None:
                    self.notice(refusal)

    def _tell(self, refusal: Refusal) -> None:
        metrics.REFUSED.labels(self._uid, refusal.reason.value).inc(refusal.count)
        self._told(refusal)
        self._logged += 1
        if self._logged <= LOGGED_REFUSALS:
            level = "error" if refusal.reason is Reason.LIMIT else "warning"
            getattr(_log, level)("refused", tenant=self._uid, refusal=str(refusal))
