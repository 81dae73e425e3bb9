"""Health-check node ports: each tells a load balancer whether this node has endpoints of one Service.

A Service of type LoadBalancer with externalTrafficPolicy Local has a node port of its own for this. Whoever dials it
gets, whatever path and method he asks for, kube-proxy's answer (pkg/proxy/healthcheck/service_health.go at 1.37): 200
if a Ready endpoint of the Service runs here and the proxy is healthy, else 503, and how many there are. The answer is
made from memory when it is asked for, so endpoints come and go without this module hearing of it. It hears when a
Service gets, changes or loses its port, and does what that Service needs: listeners of others are not touched.

As kube-proxy, a Service has a listener on each address where node ports are accepted, in each of its own families, and
each family is told its own endpoints. Different from kube-proxy: addresses that come or go later are followed, a
listener that failed is tried again by itself, and what tenants and strangers may use up is bounded:

- Listeners are sockets of this process. A tenant has at most `Limits.tenant`, all tenants together
  `Limits.tenants`, and the super cluster what is left of `Limits.sockets`: nobody can take away its share.
- A connection serves one request and lives for a few seconds. When there are too many the oldest is cut off, and that
  is never one that asks, since an answer takes no time: holding connections open keeps nobody from being answered.
"""

import asyncio
import json
import resource
import socket
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import msgspec
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from vcproxy.model.addresses import format_address, format_target
from vcproxy.model.tenant import SUPER_UID
from vcproxy.node.localpolicy import LocalPorts, ServiceId
from vcproxy.ops import logs

# kube-proxy tries again at its next sync, after 30 s at the latest.
RETRY_SECONDS = 30.0
FREED_SECONDS = 2.0
"""After a listener was closed those that failed are tried again, but not for each: a tenant may open and close many."""
TOLD = 50
"""Failures of one tenant that are logged; all are counted in `problems`."""
SHOWN = 10
CONNECTION_SECONDS = 10.0
BACKLOG = 128

log = logs.get("servicehealth")

Report = Callable[[ServiceId, int, str], None]


class Limits(msgspec.Struct, frozen=True):
    """Listening sockets (a Service takes one for each address where it listens) and open connections."""

    tenant: int = 128
    tenants: int = 1024
    sockets: int = 4096
    connections: int = 512


def socket_limits(most: int = Limits().sockets) -> Limits:
    """Limits within the descriptors that this process may open: half for listeners, a quarter of that for tenants.

    The soft limit is raised as far as that takes, if the hard one allows: Go programs do so by themselves.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * most if hard == resource.RLIM_INFINITY else min(2 * most, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    sockets = most if soft == resource.RLIM_INFINITY else min(most, soft // 2)
    tenants = sockets // 4
    return Limits(min(Limits().tenant, tenants), tenants, sockets, min(Limits().connections, sockets // 2))


class _Place(NamedTuple):
    """One listener: `address` has 4 or 16 octets, all zeros for any address of the family."""

    address: bytes
    port: int

    @property
    def family(self) -> int:
        return 4 if len(self.address) == 4 else 6

    def __str__(self) -> str:
        return format_target(self.address, self.port)


class _Refused(Exception):
    """A listener that may not be: the message says which limit it would break."""


class _Failure(NamedTuple):
    """Why nobody listens where a Service wants it."""

    port: int
    reason: str
    cure: str


class HealthCheckNodePorts:
    """Listens for the Services of `local`; `run` it. All methods belong to one event loop.

    `healthy`: whether the proxy is, asked at each request. `report` gets a Service, its port and why nobody listens
    there: once, and again when the reason changes.
    """

    def __init__(
        self,
        local: LocalPorts,
        *,
        healthy: Callable[[], bool],
        report: Report = lambda service, port, reason: None,
        limits: Limits | None = None,
        retry: float = RETRY_SECONDS,
    ) -> None:
        self._local = local
        self._healthy = healthy
        self._report = report
        self._limits = limits or Limits()
        self._retry = retry
        self._open: dict[ServiceId, dict[_Place, asyncio.Server]] = {}
        self._owners: dict[_Place, ServiceId] = {}
        self._used: Counter[str] = Counter()  # sockets by tenant
        self._failed: dict[ServiceId, _Failure] = {}
        self._told: Counter[str] = Counter()  # failures by tenant
        self._again = 0.0  # when to try again what failed
        self._due: dict[ServiceId, None] = {}
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Listen where it is wanted, for ever; ends all listeners when cancelled."""
        loop = asyncio.get_running_loop()
        http = _Http(self._answer, connections=self._limits.connections)
        self._local.changed = self._attend
        self._attend(self._local.checks)
        try:
            while True:
                self._wake.clear()
                await self._settle(http)
                try:
                    async with asyncio.timeout_at(self._again if self._failed else None):
                        await self._wake.wait()
                except TimeoutError:
                    self._due.update(dict.fromkeys(self._failed))
                    self._again = loop.time() + self._retry
        finally:
            self._local.changed = lambda services: None
            for service in list(self._open):
                self._close(service, self._open[service])
            await http.shutdown(0)

    def problems(self) -> list[str]:
        """What keeps Services from being asked about, for people: some of each tenant's."""
        found: list[str] = []
        for tenant, count in sorted(Counter(service.tenant for service in self._failed).items()):
            mine = sorted(service for service in self._failed if service.tenant == tenant)
            found += [_problem(service, self._failed[service]) for service in mine[:SHOWN]]
            found += [f"{count - SHOWN} more health-check node ports of tenant {tenant}"] * (count > SHOWN)
        return found

    @property
    def count(self) -> int:
        """Listening sockets."""
        return self._used.total()

    def _attend(self, services: Iterable[ServiceId]) -> None:
        """These are wanted otherwise than before."""
        self._due.update(dict.fromkeys(services))
        self._wake.set()

    async def _settle(self, http: "_Http") -> None:
        """Do what is due. First what closes, which may be what others of it wait for."""
        due, self._due = list(self._due), {}
        freed = False
        for service in due:
            held, wanted = self._open.get(service, {}), self._wanted(service)
            freed |= self._close(service, [place for place in held if place not in wanted])
        if freed:
            self._again = min(self._again, asyncio.get_running_loop().time() + FREED_SECONDS)
        for turn, service in enumerate(due):
            await self._listen(http, service, self._wanted(service))
            if turn % 64 == 63:
                await asyncio.sleep(0)

    def _wanted(self, service: ServiceId) -> list[_Place]:
        check = self._local.checks.get(service)
        if check is None:
            return []
        places = [_Place(address, check.port) for address in self._local.addresses]
        return [place for place in places if place.family in check.families]

    async def _listen(self, http: "_Http", service: ServiceId, wanted: Collection[_Place]) -> None:
        """All listeners of the Service, or none: half of them would tell load balancers half of the truth."""
        held = self._open.get(service, {})
        opened: dict[_Place, asyncio.Server] = {}
        try:
            for place in wanted:
                if place not in held:
                    self._admit(service.tenant, len(opened) + 1)
                    opened[place] = await _bind(place, http)
        except BaseException as error:
            for server in opened.values():
                server.close()
            if not isinstance(error, OSError | _Refused):
                raise
            self._close(service, held)
            if isinstance(error, OSError):
                cure = "free the port, or give the Service another healthCheckNodePort"
                self._fail(service, _Failure(place.port, f"listen {place}: {error.strerror}", cure))
            else:
                self._fail(service, _Failure(place.port, str(error), "have fewer such Services"))
            return
        if opened:
            self._open.setdefault(service, {}).update(opened)
            self._owners.update(dict.fromkeys(opened, service))
            self._used[service.tenant] += len(opened)
            log.debug("health-check node port opened", tenant=service.tenant, service=_name(service), on=_texts(opened))
        self._failed.pop(service, None)

    def _admit(self, tenant: str, more: int) -> None:
        """Raises _Refused."""
        limits = self._limits
        for what, used, limit in (
            ("this tenant", self._used[tenant], limits.tenant),
            ("all tenants together", self._used.total() - self._used[SUPER_UID], limits.tenants),
        ):
            if tenant != SUPER_UID and used + more > limit:
                raise _Refused(f"{what} may have {limit} listeners")
        if self._used.total() + more > limits.sockets:
            raise _Refused(f"a node may have {limits.sockets} listeners")

    def _close(self, service: ServiceId, places: Iterable[_Place]) -> bool:
        """Close these listeners of the Service; True if there were any."""
        held, closed = self._open.get(service, {}), list(places)
        for place in closed:
            held.pop(place).close()
            del self._owners[place]
        self._used[service.tenant] -= len(closed)
        if not held:
            self._open.pop(service, None)
        if not self._used[service.tenant]:
            del self._used[service.tenant]
        if closed:
            log.debug("health-check node port closed", tenant=service.tenant, service=_name(service), on=_texts(closed))
        return bool(closed)

    def _fail(self, service: ServiceId, failure: _Failure) -> None:
        if not self._failed:
            self._again = asyncio.get_running_loop().time() + self._retry
        if self._failed.get(service) == failure:
            return
        self._failed[service] = failure
        self._told[service.tenant] += 1
        if service.tenant == SUPER_UID or self._told[service.tenant] <= TOLD:
            log.warning("a health-check node port is not served", problem=_problem(service, failure))
            self._report(service, failure.port, failure.reason)

    def _answer(self, address: bytes, port: int) -> web.Response:
        """What a load balancer that dialled this is told."""
        service = self._owners.get(_Place(address, port)) or self._owners.get(_Place(bytes(len(address)), port))
        if service is None:  # closed between the connection and its request
            return web.Response(status=503)
        count = self._local.ready(service, 4 if len(address) == 4 else 6)
        healthy = self._healthy()
        body = {
            "service": {"namespace": service.namespace, "name": service.name},
            "localEndpoints": count,
            "serviceProxyHealthy": healthy,
        }
        return web.Response(
            body=json.dumps(body, indent="\t").encode(),
            status=200 if count and healthy else 503,
            content_type="application/json",
            headers={"X-Content-Type-Options": "nosniff", "X-Load-Balancing-Endpoint-Weight": str(count)},
        )


async def _bind(place: _Place, http: "_Http") -> asyncio.Server:
    """Raises OSError."""
    made = socket.socket(socket.AF_INET if place.family == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if place.family == 6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((format_address(place.address), place.port))
        return await asyncio.get_running_loop().create_server(http, sock=made, backlog=BACKLOG)
    except BaseException:
        made.close()
        raise


class _Http(web.Server):
    """One HTTP server behind all listeners: a connection serves one request, and none lives long."""

    def __init__(self, answer: Callable[[bytes, int], web.Response], *, connections: int) -> None:
        super().__init__(self._handle, access_log=None)
        self._answer = answer
        self._most = connections
        self._lives: dict[RequestHandler, tuple[asyncio.Transport, asyncio.TimerHandle]] = {}

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        transport = request.transport
        if transport is None:
            return web.Response(status=503)
        host, port, *_ = transport.get_extra_info("sockname")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        response = self._answer(socket.inet_pton(family, host), port)
        response.force_close()
        return response

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Somebody connected: he has some seconds."""
        super().connection_made(handler, transport)
        if len(self._lives) >= self._most:
            oldest, oldest_timer = self._lives.pop(next(iter(self._lives)))
            oldest_timer.cancel()
            oldest.abort()
        timer = asyncio.get_running_loop().call_later(CONNECTION_SECONDS, transport.abort)
        self._lives[handler] = (transport, timer)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """He is gone."""
        super().connection_lost(handler, exc)
        if (life := self._lives.pop(handler, None)) is not None:
            life[1].cancel()


def _name(service: ServiceId) -> str:
    return f"{service.namespace}/{service.name}"


def _texts(places: Iterable[_Place]) -> list[str]:
    return [str(place) for place in places]


def _problem(service: ServiceId, failure: _Failure) -> str:
    where = f"tenant {service.tenant}: Service {_name(service)}: health-check node port {failure.port}"
    return f"{where}: {failure.reason}; to load balancers this node has no endpoints of it: {failure.cure}"
