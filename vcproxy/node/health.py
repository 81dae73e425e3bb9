"""/healthz and /livez as kube-proxy answers them, and /readyz: for load balancers, liveness and readiness probes.

The contract is pkg/proxy/healthcheck/proxy_health.go at 1.37, so that whatever asks a kube-proxy may ask this:

- healthy is a node on which no queued update is older than the timeout, and one that still starts. What counts as the
  node's trouble and what is one tenant's alone is decided in report.
- /healthz is for load balancers: it fails also while the Node is on its way out (KEP-3836), so that they drain it.
  /livez is for the kubelet and does not: a restart would mend nothing.
- The status code is the answer, 200 or 503. In the body, `lastUpdated` is now when the answer is 200 (kube-proxy's own
  compatibility with its older self), else when something was last programmed. One transaction programs both IP
  families, so their `status` is the same.

/readyz is ours: started, told by somebody what to program, and done with it. It also says what it waits for.
"""

import datetime
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from vcproxy.node import proxymetrics
from vcproxy.node.localpolicy import FAMILY_NAMES
from vcproxy.ops.metrics import Handler

# kube-proxy: twice the sync period.
TIMEOUT = 60.0


class Health(msgspec.Struct, frozen=True):
    """The agent's health.

    `late`: tenant or duty -> seconds. `last_success`: Unix seconds. `waiting_for`: for ready. `eligible`: load
    balancers may send here, by the Node object.
    """

    late: Mapping[str, float]
    last_success: float
    waiting_for: str = ""
    eligible: bool = True

    @property
    def well(self) -> bool:
        """Nothing is late."""
        return not self.late


def handlers(health: Callable[[], Health]) -> Mapping[str, Handler]:
    """The routes; `health` is asked at each request."""

    async def healthz(_: web.Request) -> web.Response:
        now = health()
        well = now.well and now.eligible
        proxymetrics.HEALTHZ.labels("200" if well else "503").inc()
        return _answer(_body(now, well, nodeEligible=now.eligible), well)

    async def livez(_: web.Request) -> web.Response:
        now = health()
        proxymetrics.LIVEZ.labels("200" if now.well else "503").inc()
        return _answer(_body(now, now.well), now.well)

    async def readyz(_: web.Request) -> web.Response:
        now = health()
        well = now.well and not now.waiting_for
        late = {name: round(seconds, 1) for name, seconds in now.late.items()}
        return _answer({**_body(now, now.well), "late": late, "waitingFor": now.waiting_for}, well)

    return {"/healthz": healthz, "/livez": livez, "/readyz": readyz}


async def ping(request: web.Request) -> web.Response:
    """/healthz beside /metrics, as every Kubernetes component has it: the process answers, no more is said."""
    verbose = "verbose" in request.query
    return web.Response(
        text="[+]ping ok\nhealthz check passed\n" if verbose else "ok", headers={"X-Content-Type-Options": "nosniff"}
    )


def _body(health: Health, well: bool, **eligible: bool) -> dict[str, Any]:
    """ProxyHealth of kube-proxy; its order of fields too."""
    now = time.time()
    updated = _text(health.last_success)
    return {
        "lastUpdated": _text(now) if well else updated,
        "currentTime": _text(now),
        **eligible,
        "healthy": health.well,
        "status": {family: {"lastUpdated": updated, "healthy": health.well} for family in FAMILY_NAMES.values()},
    }


def _answer(body: Mapping[str, Any], well: bool) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body),
        status=200 if well else 503,
        content_type="application/json",
        headers={"X-Content-Type-Options": "nosniff"},
    )


def _text(seconds: float) -> str:
    """RFC 3339, as Go writes a time."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat().replace("+00:00", "Z")
