"""What is refused, told to the tenant where it looks: as Events in its own API server.

The tenant's server is the tenant's, so this is a courtesy and never more. Refusals are handed over and forgotten; one
task writes them one after another, a few at once and then one every ten seconds. The same refusal again raises the
count of its Event. What comes faster, or cannot be written, is lost: `vcproxy explain` has it. Credentials that may not
write Events are not tried again until they change.

A tenant learns that an address is not its own, not whose it is: otherwise its Services would be a way to ask for the
nodes and pods of others.
"""

import asyncio
import datetime
import hashlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote

import msgspec

from vcproxy.brain.guard import Refusal, for_tenant
from vcproxy.kube.budget import Budget
from vcproxy.kube.client import MERGE_PATCH
from vcproxy.kube.errors import ApiError, Forbidden, NotFound, Unauthorized
from vcproxy.ops import logs

BURST = 10
PAUSE_SECONDS = 10.0
WAITING = 64
"""Refusals that wait to be told; further ones are not."""
REMEMBERED = 256
"""Events whose count can still be raised."""

_log = logs.get("announcer")
_API_VERSIONS = {"Service": "v1", "EndpointSlice": "discovery.k8s.io/v1"}

Subject = tuple[str, str, str, str, str]
"""Kind, namespace, name, field, reason: what makes two refusals the same."""


class _Told(NamedTuple):
    event: str
    times: int


class Announcer:
    """Tells one tenant. `request`: a request to its API server, as Client.request; `instance`: which brain this is."""

    def __init__(
        self,
        request: Callable[..., Awaitable[bytes]],
        *,
        tenant: str,
        instance: str,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.enabled = True
        self.barred = False
        self._request = request
        self._tenant = tenant
        self._instance = instance
        self._clock = clock
        self._wall = wall
        self._sleep = sleep
        self._waiting: dict[Subject, Refusal] = {}
        self._told: dict[Subject, _Told] = {}
        self._arrived = asyncio.Event()
        self._budget = Budget(1 / PAUSE_SECONDS, BURST, clock())

    def tell(self, refusal: Refusal) -> None:
        """Have it told, perhaps. Never blocks, never raises."""
        subject = (refusal.kind, refusal.namespace, refusal.name, refusal.field, refusal.reason.value)
        if self.enabled and not self.barred and (subject in self._waiting or len(self._waiting) < WAITING):
            self._waiting[subject] = refusal
            self._arrived.set()

    def credentials_changed(self) -> None:
        """Those that might not write Events are others now."""
        self.barred = False

    async def run(self) -> NoReturn:
        """Tell what there is, for ever. Nothing but cancellation comes out."""
        while True:
            await self._arrived.wait()
            if not self._waiting:
                self._arrived.clear()
                continue
            if wait := self._budget.spend(1, self._clock()):
                await self._sleep(wait)
            subject = next(iter(self._waiting))
            refusal = self._waiting.pop(subject)
            if not self.enabled or self.barred:
                continue
            try:
                await self._write(subject, refusal)
            except (Forbidden, Unauthorized) as error:
                self.barred = True
                self._waiting.clear()
                _log.info("a tenant is not told of refusals: its credentials do not allow Events", tenant=self._tenant)
                _log.debug("refused to write an Event", tenant=self._tenant, error=str(error))
            except ApiError as error:
                _log.debug("an Event was lost", tenant=self._tenant, error=str(error))
            except Exception:  # a fault of ours: a courtesy must not end what all tenants share
                _log.exception("an Event was lost to an internal error", tenant=self._tenant)

    async def _write(self, subject: Subject, refusal: Refusal) -> None:
        now = datetime.datetime.fromtimestamp(self._wall(), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        namespace = refusal.namespace or "default"
        path = f"/api/v1/namespaces/{quote(namespace, safe='')}/events"
        told = self._told.pop(subject, None)
        if told is not None:
            told = told._replace(times=told.times + 1)
            raised = {"count": told.times, "lastTimestamp": now, "message": _message(refusal)}
            try:
                body = msgspec.json.encode(raised)
                await self._request("PATCH", f"{path}/{told.event}", body=body, content_type=MERGE_PATCH)
            except NotFound:  # Events live for an hour
                told = None
        if told is None:
            made = self._event(subject, refusal, namespace, now)
            await self._request("POST", path, body=msgspec.json.encode(made))
            told = _Told(made["metadata"]["name"], 1)
        self._told[subject] = told
        if len(self._told) > REMEMBERED:
            del self._told[next(iter(self._told))]

    def _event(self, subject: Subject, refusal: Refusal, namespace: str, now: str) -> dict[str, Any]:
        # Not the object's name: what a lying server calls a name need not be one.
        digest = hashlib.blake2b(repr((subject, self._wall())).encode(), digest_size=10).hexdigest()
        about = {
            "apiVersion": _API_VERSIONS[refusal.kind],
            "kind": refusal.kind,
            "namespace": refusal.namespace,
            "name": refusal.name,
            "uid": refusal.uid,
        }
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"vcproxy.{digest}", "namespace": namespace},
            "involvedObject": {key: value for key, value in about.items() if value},
            "type": "Warning",
            "reason": "Refused",
            "action": "Serving",
            "message": _message(refusal),
            "source": {"component": "vcproxy"},
            "reportingComponent": "vcproxy",
            "reportingInstance": self._instance,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }


def _message(refusal: Refusal) -> str:
    reason, cure = for_tenant(refusal)
    several = f" and {refusal.count - 1} more are" if refusal.count > 1 else " is"
    return f"{refusal.field}: {refusal.value}{several} not used ({reason}): {cure}"[:1024]
