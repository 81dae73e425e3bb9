"""The node agent put together: configuration to a running process that ends cleanly.

Order of the start: health first, so that probes see a node that starts and not a dead one; then links, the last good
state and the backend, all of which work with the brain down; the session last. Nothing is undone at the end: the
process stops reading, the backend call under way is waited for, the last good state is written, and what is programmed
keeps forwarding.
"""

import asyncio
import contextlib
import socket
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from vcproxy.backend import registry
from vcproxy.backend.protocol import Backend
from vcproxy.model.endpoints import name_id
from vcproxy.model.tenant import SUPER_UID
from vcproxy.node import configz, health, proxymetrics, sysctls
from vcproxy.node.agent import Agent
from vcproxy.node.cache import Cache
from vcproxy.node.config import NodeConfiguration
from vcproxy.node.holdings import Held, Holdings, SessionEvent
from vcproxy.node.links import LinkMonitor
from vcproxy.node.localhost import LocalhostNodePorts
from vcproxy.node.localpolicy import ServiceId
from vcproxy.node.look import health_of, is_healthy, status_of, tenant_rows
from vcproxy.node.nodestate import node_rules
from vcproxy.node.servicehealth import HealthCheckNodePorts, socket_limits
from vcproxy.node.session import Connect
from vcproxy.node.sessions import Sessions
from vcproxy.ops import admin, logs, metrics, views
from vcproxy.ops.configfile import ConfigError
from vcproxy.ops.events import Event, EventRecorder
from vcproxy.ops.stopping import until_stopped

BIND_AGAIN = 5.0  # seconds, as kube-proxy

log = logs.get("node")


class NodeAgent:
    """The program behind `vcproxy node`.

    `backend`: in place of the configured one. `events`: what kube-proxy writes Events about is written there; without
    it (an agent of its own has no credentials for any API server) the log and `status` have it. `shown`: what /configz
    shows, by API group, in place of `config`. `connect`: the way to the brain, in place of gRPC. Raises ConfigError
    when the configuration cannot be used, and BackendUnavailable when the backend does not exist.
    """

    def __init__(
        self,
        config: NodeConfiguration,
        *,
        backend: Backend | None = None,
        events: EventRecorder | None = None,
        shown: Mapping[str, Any] | None = None,
        connect: Connect | None = None,
    ) -> None:
        self.started = asyncio.Event()
        """What is remembered was tried to be programmed, or was there."""
        self._events = events
        self._config = config
        self._shown = shown or configz.document(config)
        self.node = config.node_name or socket.gethostname().lower()
        self._holdings = Holdings()
        self._cache = Cache(Path(config.state_directory), node=self.node, holdings=self._holdings)
        for at, entry in enumerate(config.attachments):
            if (entry.interface is None) == (entry.address is None):
                raise ConfigError(f"attachments[{at}]: set exactly one of interface and address")
        if not config.brain.addresses:
            raise ConfigError("brain.addresses: name at least one host:port of the brain")
        self._not_served: set[str] = set()
        self._sessions = Sessions(
            node=self.node,
            brains=config.brain.addresses,
            connect=connect or _dialler(config),
            holdings=self._holdings,
            sink=self._sink,
        )
        rules = node_rules(config)
        backend = backend or _backend(config)
        self._localhost = LocalhostNodePorts(rules.localhost)
        self._agent = Agent(
            node=self.node,
            backend=self._localhost.watch(backend) if rules.localhost else backend,
            holdings=self._holdings,
            acknowledge=self._sessions,
            memory=self._cache,
            attachments=config.attachments,
            rules=rules,
        )
        self._health_checks = HealthCheckNodePorts(
            self._agent.progress.local,
            healthy=lambda: is_healthy(self._agent),
            report=self._not_listening,
            limits=socket_limits(),
        )

    def _sink(self, event: SessionEvent) -> None:
        self._agent.handle(event)

    async def run(self, stop: asyncio.Event | None = None) -> None:
        """Run until SIGTERM or SIGINT, or until `stop` is set (then signals are the caller's).

        Raises ConfigError for an address that cannot be served on, AdminError, BackendUnavailable.
        """
        await until_stopped(self._serve, stop)
        log.info("ended; what is programmed stays", node=self.node)

    async def _serve(self) -> None:
        config = self._config
        async with contextlib.AsyncExitStack() as stack:
            proxymetrics.begin()
            late = [served for served in self._served() if not await served.begin(stack)]
            self._not_served = {served.address for served in late}
            stack.push_async_callback(self._cache.flush)
            stack.push_async_callback(self._agent.close)
            stack.enter_context(LinkMonitor(self._agent.see_links))
            remembered = await asyncio.to_thread(self._cache.load)
            log.info("starting", node=self.node, backend=config.backend.name, remembered=len(remembered.tenants))
            await self._agent.start(remembered.tenants, remembered.facts, remembered.placement)
            if config.conntrack is not None:
                # Behind the backend, whose table has the kernel load the module that these are of.
                await asyncio.to_thread(sysctls.apply, config.conntrack)
            await stack.enter_async_context(admin.serve(config.admin_socket, self._routes()))
            log.info("started", node=self.node, tenants=len(self._holdings))
            self.started.set()
            async with asyncio.TaskGroup() as group:
                if self._events is not None:
                    self._events.emit(Event("Node", "", self.node, "Normal", "Starting", "StartKubeProxy"))
                    group.create_task(self._events.run())
                group.create_task(self._agent.run())
                group.create_task(self._health_checks.run())
                group.create_task(self._cache.run())
                group.create_task(self._sessions.run())
                group.create_task(self._localhost.run())
                for served in late:
                    group.create_task(served.begin_later(self._not_served))

    def _served(self) -> "tuple[_Served, ...]":
        config = self._config
        healthy = health.handlers(lambda: health_of(self._agent, awaited=self._sessions.awaited))
        pings = {"/healthz": health.ping, "/healthz/ping": health.ping}
        shown = {"/metrics": metrics.show, **pings, **configz.handlers(self._shown, mode=config.backend.name)}
        return (
            _Served("healthAddress", config.health_address, healthy, config.bind_hard_fail),
            _Served("metricsAddress", config.metrics_address, shown, config.bind_hard_fail),
        )

    @property
    def remembers(self) -> bool:
        """True if an earlier run left a last good state of some tenant. A look at the disk."""
        return self._cache.remembers

    def has_programmed(self, uid: str) -> bool:
        """True once this run has programmed all of a tenant."""
        state = self._agent.progress.tenants.get(uid)
        return state is not None and state.revision is not None

    def not_served(self) -> Collection[str]:
        """Addresses of its own that somebody else has."""
        return self._not_served

    def _not_listening(self, service: ServiceId, port: int, reason: str) -> None:
        """Nobody listens on a health-check node port: tell the super cluster of its own Services."""
        if self._events is not None and service.tenant == SUPER_UID:
            name = f"{service.namespace}/{service.name}"
            note = f'node {self.node} failed to start healthcheck "{name}" on port {port}: {reason}'
            self._events.emit(
                Event(
                    "Service",
                    service.namespace,
                    service.name,
                    "Warning",
                    "FailedToStartServiceHealthcheck",
                    "Listen",
                    note,
                )
            )

    def _routes(self) -> Mapping[str, admin.Provider]:
        return {
            "/status": lambda _: status_of(
                self._agent,
                (*self._health_checks.problems(), *self._sessions.problems),
                self._sessions.streams(),
            ),
            "/tenants": lambda query: [
                row for row in tenant_rows(self._agent) if query.get("tenant") in (None, row["uid"], row["name"])
            ],
            "/services": lambda query: self._rows(query, views.service_rows),
            "/frontends": lambda query: self._rows(query, views.frontend_rows),
            "/endpoints": lambda query: self._rows(
                query, lambda uid, model: views.endpoint_rows(uid, model, {name_id(self.node): self.node})
            ),
            "/addresses": lambda _: views.address_rows(self._agent.attached.addresses),
        }

    def _rows(self, query: Mapping[str, str], rows: Any) -> list[views.Row]:
        return [row for held in self._asked(query.get("tenant")) for row in rows(held.tenant.uid, held.model)]

    def _asked(self, tenant: str | None) -> list[Held]:
        """The tenants that a query is about. Raises KeyError for one that is not here."""
        found = [
            held for uid, held in sorted(self._holdings.tenants.items()) if tenant in (None, uid, held.tenant.name)
        ]
        if tenant is not None and not found:
            raise KeyError(f"tenant {tenant!r} is not on this node")
        return found


def _dialler(config: NodeConfiguration) -> Connect:
    from vcproxy.node.dialling import Dialler  # gRPC, which a node with its brain in the same process does without

    return Dialler(config.brain)


def _backend(config: NodeConfiguration) -> Backend:
    try:
        return registry.create(config.backend.name, config.backend.options)
    except ValueError as error:
        raise ConfigError(f"backend.options: {error}") from error


class _Served(NamedTuple):
    """An address to serve on. `hard_fail`: that it is taken is an error; else it is tried again and again."""

    field: str
    address: str
    handlers: Mapping[str, metrics.Handler]
    hard_fail: bool

    async def begin(self, stack: contextlib.AsyncExitStack) -> bool:
        """Serve for as long as `stack` is open; False: not yet. Raises ConfigError."""
        try:
            await stack.enter_async_context(metrics.serve(self.address, self.handlers))
        except (OSError, ValueError) as error:
            if self.hard_fail or not isinstance(error, OSError):
                raise ConfigError(
                    f"{self.field} {self.address}: cannot be served on: {error}: stop what listens there "
                    '(kube-proxy?), choose another address, or "" for none'
                ) from error
            log.warning("cannot serve on an address; trying again", field=self.field, error=str(error))
            return False
        return True

    async def begin_later(self, waiting: set[str]) -> NoReturn:
        """Serve as soon as it can be, for ever; then the address leaves `waiting`."""
        while True:
            await asyncio.sleep(BIND_AGAIN)
            with contextlib.suppress(OSError):
                async with metrics.serve(self.address, self.handlers):
                    log.info("serving now", field=self.field, address=self.address)
                    waiting.discard(self.address)
                    await asyncio.Event().wait()
