"""The node agent put together: configuration to a running process that ends cleanly.

Order of the start: health first, so that probes see a node that starts and not a dead one; then links, the last good
state and the backend, all of which work with the brain down; the session last. Nothing is undone at the end: the
process stops reading, the backend call under way is waited for, the last good state is written, and what is programmed
keeps forwarding.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from vcproxy.backend import registry
from vcproxy.backend.protocol import Backend
from vcproxy.model.endpoints import name_id
from vcproxy.model.tenant import SUPER_UID
from vcproxy.node import health, proxymetrics
from vcproxy.node.agent import Agent
from vcproxy.node.cache import Cache
from vcproxy.node.config import NodeConfiguration
from vcproxy.node.holdings import Held, Holdings, SessionEvent
from vcproxy.node.links import LinkMonitor
from vcproxy.node.localpolicy import ServiceId
from vcproxy.node.look import health_of, is_healthy, status_of, tenant_rows
from vcproxy.node.nodestate import node_rules
from vcproxy.node.servicehealth import HealthCheckNodePorts, socket_limits
from vcproxy.node.session import Session
from vcproxy.ops import admin, logs, metrics, views
from vcproxy.ops.configfile import ConfigError
from vcproxy.ops.events import Event, EventRecorder
from vcproxy.ops.stopping import until_stopped

log = logs.get("node")


class NodeAgent:
    """The program behind `vcproxy node`.

    `backend`: in place of the configured one. `events`: what kube-proxy writes Events about is written there; without
    it (an agent of its own has no credentials for any API server) the log and `status` have it. Raises ConfigError when
    the configuration cannot be used, and BackendUnavailable when the backend does not exist.
    """

    def __init__(
        self, config: NodeConfiguration, *, backend: Backend | None = None, events: EventRecorder | None = None
    ) -> None:
        self._events = events
        self._config = config
        self.node = config.node_name or socket.gethostname().lower()
        self._holdings = Holdings()
        self._cache = Cache(Path(config.state_directory), node=self.node, holdings=self._holdings)
        for at, entry in enumerate(config.attachments):
            if (entry.interface is None) == (entry.address is None):
                raise ConfigError(f"attachments[{at}]: set exactly one of interface and address")
        if not config.brain.addresses:
            raise ConfigError("brain.addresses: name at least one host:port of the brain")
        self._session = Session(
            node=self.node,
            brains=config.brain.addresses,
            tls=config.brain,
            holdings=self._holdings,
            sink=self._sink,
        )
        self._agent = Agent(
            node=self.node,
            backend=backend or _backend(config),
            holdings=self._holdings,
            acknowledge=self._session,
            memory=self._cache,
            attachments=config.attachments,
            rules=node_rules(config),
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
            await stack.enter_async_context(
                _serving("healthAddress", config.health_address, health.handlers(lambda: health_of(self._agent)))
            )
            await stack.enter_async_context(
                _serving(
                    "metricsAddress",
                    config.metrics_address,
                    {"/metrics": metrics.show, "/healthz": health.ping, "/healthz/ping": health.ping},
                )
            )
            stack.push_async_callback(self._cache.flush)
            stack.push_async_callback(self._agent.close)
            stack.enter_context(LinkMonitor(self._agent.see_links))
            remembered = await asyncio.to_thread(self._cache.load)
            log.info("starting", node=self.node, backend=config.backend.name, remembered=len(remembered.tenants))
            await self._agent.start(remembered.tenants, remembered.facts, remembered.placement)
            await stack.enter_async_context(admin.serve(config.admin_socket, self._routes()))
            log.info("started", node=self.node, tenants=len(self._holdings))
            async with asyncio.TaskGroup() as group:
                if self._events is not None:
                    self._events.emit(Event("Node", "", self.node, "Normal", "Starting", "StartKubeProxy"))
                    group.create_task(self._events.run())
                group.create_task(self._agent.run())
                group.create_task(self._health_checks.run())
                group.create_task(self._cache.run())
                group.create_task(self._session.run())

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
            "/status": lambda _: status_of(self._agent, self._health_checks.problems()),
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


def _backend(config: NodeConfiguration) -> Backend:
    try:
        return registry.create(config.backend.name, config.backend.options)
    except ValueError as error:
        raise ConfigError(f"backend.options: {error}") from error


@contextlib.asynccontextmanager
async def _serving(field: str, address: str, handlers: Mapping[str, metrics.Handler]) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(metrics.serve(address, handlers))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{field} {address}: cannot be served on: {error}: stop what listens there (kube-proxy?), "
                'choose another address, or "" for none'
            ) from error
        yield
