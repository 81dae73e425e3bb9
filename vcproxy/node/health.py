"""/healthz, /livez, /readyz on kube-proxy's port: for load balancers, liveness and readiness probes.

As kube-proxy: healthy is a node on which no queued update is older than the timeout, and one that still starts. What
counts as the node's trouble and what is one tenant's alone is decided in report. The status code is the answer, 200 or
503; the JSON body says why: kube-proxy's `lastUpdated` and `currentTime`, and what is late by how many seconds.
"""

import datetime
import time
from collections.abc import Callable, Mapping

import msgspec
from aiohttp import web

from vcproxy.ops.metrics import Handler

# kube-proxy: twice the sync period.
TIMEOUT = 60.0


class Health(msgspec.Struct, frozen=True):
    """The agent's health. `late`: tenant or duty -> seconds. `last_success`: Unix seconds. `waiting_for`: for ready."""

    late: Mapping[str, float]
    last_success: float
    waiting_for: str = ""


def handlers(health: Callable[[], Health]) -> Mapping[str, Handler]:
    """The routes; `health` is asked at each request."""

    async def alive(_: web.Request) -> web.Response:
        now = health()
        return _answer(now, not now.late)

    async def ready(_: web.Request) -> web.Response:
        now = health()
        return _answer(now, not now.late and not now.waiting_for)

    return {"/healthz": alive, "/livez": alive, "/readyz": ready}


def _answer(health: Health, well: bool) -> web.Response:
    now = time.time()
    body = {
        "lastUpdated": _text(health.last_success if health.late else now),
        "currentTime": _text(now),
        "healthy": not health.late,
        "late": {name: round(seconds, 1) for name, seconds in health.late.items()},
        "waitingFor": health.waiting_for,
    }
    return web.Response(
        body=msgspec.json.encode(body),
        status=200 if well else 503,
        content_type="application/json",
        headers={"X-Content-Type-Options": "nosniff"},
    )


def _text(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()
