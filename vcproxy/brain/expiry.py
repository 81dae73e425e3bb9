"""Credentials that are about to end are shown before they do: as a problem in `status`, in the log, and as a metric.

Whoever made them renews them (a controller, kubeadm, a person), and the brain takes up the new ones by itself. What is
shown here is that this did not happen in time.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import NoReturn

from vcproxy.brain.sources import Problem
from vcproxy.kube.kubeconfig import Credentials
from vcproxy.kube.lifetime import Lifetime, lifetime
from vcproxy.ops import logs, metrics

LOOK_SECONDS = 60.0

_log = logs.get("credentials")


class Expiries:
    """When the credentials in use end, by tenant (uid). `clock`: Unix seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._held: dict[str, Lifetime] = {}
        self._told: dict[str, Lifetime] = {}

    def put(self, uid: str, credentials: Credentials) -> None:
        """These are in use now."""
        found = lifetime(credentials)
        metrics.CREDENTIALS_EXPIRY.labels(uid).set(found.ends if found is not None else 0)
        if found is not None:
            self._held[uid] = found
        else:
            self._held.pop(uid, None)

    def forget(self, uid: str) -> None:
        """The tenant is gone."""
        self._held.pop(uid, None)
        self._told.pop(uid, None)
        metrics.CREDENTIALS_EXPIRY.remove(uid)

    def problems(self) -> list[Problem]:
        """Those that should have been renewed by now."""
        return [Problem(f"tenant {uid}", self._words(found)) for uid, found in self._due()]

    async def run(self) -> NoReturn:
        """Log each of them once."""
        while True:
            self.tell()
            await asyncio.sleep(LOOK_SECONDS)

    def tell(self) -> None:
        """Log those that were not logged yet."""
        for uid, found in self._due():
            if self._told.get(uid) != found:
                self._told[uid] = found
                _log.warning("credentials not renewed in time", tenant=uid, ends=_time(found.ends))

    def _due(self) -> Iterable[tuple[str, Lifetime]]:
        now = self._clock()
        return [(uid, found) for uid, found in sorted(self._held.items()) if found.notice <= now]

    def _words(self, found: Lifetime) -> str:
        when = "have expired" if found.ends <= self._clock() else "expire"
        return f"its credentials {when} at {_time(found.ends)}: renew its kubeconfig"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
