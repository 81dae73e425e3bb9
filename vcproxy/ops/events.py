"""Kubernetes Events: what people see in `kubectl describe`, written without ever standing in anybody's way.

An Event is a courtesy. Whoever has something to tell hands it over and goes on; one task writes them one after another,
in an API server's own time. What cannot be written, comes too fast, or says again what was just said, is lost, and the
log has it anyway. As kube-proxy's broadcaster (client-go tools/events): events.k8s.io/v1, some tries for a server that
is away, and the same Event again within six minutes is not another one.
"""

import asyncio
import datetime
import time
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec

from vcproxy.kube.client import Client
from vcproxy.kube.errors import Conflict, ServerError, Throttled, Unreachable
from vcproxy.kube.kubeconfig import Credentials
from vcproxy.ops import logs

CONTROLLER = "vcproxy"
WAITING = 64
"""Events that wait to be written; further ones are lost."""
PAUSE_SECONDS = 0.2
SAME_SECONDS = 360.0
TRIES = 12
RETRY_SECONDS = 10.0
LONGEST_NOTE = 1024  # the API's limits
LONGEST_INSTANCE = 128

_log = logs.get("events")


class Event(msgspec.Struct, frozen=True):
    """What to tell about an object of the super cluster. `namespace` is "" for cluster-scoped kinds.

    `type` is Normal or Warning; `reason` and `action` are words for machines, `note` is for people.
    """

    kind: str
    namespace: str
    name: str
    type: str
    reason: str
    action: str
    note: str = ""


class EventRecorder:
    """Writes Events to one API server; `run` it within a TaskGroup. `emit` may be called before.

    `credentials` are asked for anew for each Event, which are few, so that rotation needs no care; it may raise
    KubeconfigError. `host`: where this program runs.
    """

    def __init__(
        self,
        credentials: Callable[[], Credentials],
        *,
        host: str,
        clock: Callable[[], float] = time.monotonic,
        pause: float = PAUSE_SECONDS,
        retry: float = RETRY_SECONDS,
    ) -> None:
        self._credentials = credentials
        self._instance = f"{CONTROLLER}-{host}"[:LONGEST_INSTANCE]
        self._clock = clock
        self._pause = pause
        self._retry = retry
        self._queue: asyncio.Queue[tuple[Event, int]] = asyncio.Queue(WAITING)
        self._recent: dict[Event, float] = {}
        self._warned = False

    def emit(self, event: Event) -> None:
        """Have it written, perhaps. Never blocks, never raises."""
        now = self._clock()
        self._recent = {said: at for said, at in self._recent.items() if now - at < SAME_SECONDS}
        if event in self._recent or self._queue.full():
            return
        self._recent[event] = now
        self._queue.put_nowait((event, time.time_ns()))

    async def run(self) -> NoReturn:
        """Write what was emitted, for ever. Raises nothing."""
        while True:
            event, happened = await self._queue.get()
            await self._write(event, happened)
            await asyncio.sleep(self._pause)

    async def _write(self, event: Event, happened: int) -> None:
        body = self._object(event, happened)
        path = f"/apis/events.k8s.io/v1/namespaces/{body['metadata']['namespace']}/events"
        for _ in range(TRIES):
            wait = self._retry
            try:
                async with Client(await asyncio.to_thread(self._credentials), tenant="super") as client:
                    await client.post(path, body)
            except Conflict:
                return  # it is there: the answer to the last try was lost
            except (Unreachable, ServerError, Throttled) as error:
                wait = max(wait, error.retry_after or 0.0)
            except Exception as error:  # whatever it is, it is not worth more than a line
                self._warn(error)
                return
            else:
                return
            await asyncio.sleep(wait)

    def _warn(self, error: Exception) -> None:
        """Once: what is wrong with one Event is wrong with all."""
        if not self._warned:
            self._warned = True
            _log.warning(
                "Events cannot be written; nothing else is affected",
                error=str(error),
                cure="allow create on events.events.k8s.io to the identity of the super cluster's kubeconfig",
            )

    def _object(self, event: Event, happened: int) -> dict[str, Any]:
        regarding = {"apiVersion": "v1", "kind": event.kind, "name": event.name}
        if event.namespace:
            regarding["namespace"] = event.namespace
        at = datetime.datetime.fromtimestamp(happened / 1e9, datetime.UTC)
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": f"{event.name}.{happened:x}", "namespace": event.namespace or "default"},
            "eventTime": at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "reportingController": CONTROLLER,
            "reportingInstance": self._instance,
            "regarding": regarding,
            "type": event.type,
            "reason": event.reason,
            "action": event.action,
            "note": event.note[:LONGEST_NOTE],
        }
