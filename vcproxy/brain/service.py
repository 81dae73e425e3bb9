"""The brain put together: configuration to a running process that ends cleanly.

    sources -> tenants -> feeds -> store      \\
    super cluster -> placement, ownership,     > distributor -> nodes
                     policies -> grants       /
    manifests' Pods -> placement              /

The placement is ready, and with it nodes may be told to forget what nobody names, once every source has told all its
tenants and the super cluster's Pods and Nodes have been read. Until then nodes only ever learn more. Nothing is undone
at the end: streams close, nodes keep what they have.
"""

import asyncio
import contextlib
import re
import socket
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from vcproxy.brain import look
from vcproxy.brain.apiservers import ApiServers
from vcproxy.brain.config import BrainConfiguration
from vcproxy.brain.distribution import Distributor
from vcproxy.brain.election import Timing
from vcproxy.brain.feed import Feed
from vcproxy.brain.grants import Grants
from vcproxy.brain.guard import UNRESTRICTED, Policy
from vcproxy.brain.leases import LeaseClient
from vcproxy.brain.memory import Memory
from vcproxy.brain.ownership import Ownership, Rights
from vcproxy.brain.placement import Placement, Scope
from vcproxy.brain.policies import Policies
from vcproxy.brain.sharding import Sharding
from vcproxy.brain.sources import Problem, catalogue
from vcproxy.brain.sources.attribution import Owners
from vcproxy.brain.store import Store, Stored
from vcproxy.brain.superaccess import SuperAccess
from vcproxy.brain.supercluster import SuperClusterFeed
from vcproxy.brain.tenants import Tenants
from vcproxy.brain.vouched import Vouched
from vcproxy.model.addresses import AddressError
from vcproxy.model.tenant import SUPER_UID
from vcproxy.ops import admin, garbage, logs, metrics
from vcproxy.ops.configfile import ConfigError
from vcproxy.ops.stopping import until_stopped

TICK_SECONDS = 1.0
_HOST = re.compile("[^a-z0-9]+")

_log = logs.get("brain")


class Brain:
    """The program behind `vcproxy brain`. Raises ConfigError when the configuration cannot be used.

    `listening`: nodes come over gRPC; else they come to `distributor.attend`, in the same process.
    """

    def __init__(self, config: BrainConfiguration, *, listening: bool = True) -> None:
        self._config = config
        self._listening = listening
        self.store = Store()
        self.placement = Placement(linger_seconds=config.tenants.linger_seconds)
        self.distributor = Distributor(store=self.store, placement=self.placement, sharded=config.sharding is not None)
        self._super: SuperClusterFeed | None = None
        self._began = time.monotonic()
        self._litter = False  # tenants were let go to other brains
        self._loading: set[str] = set()  # tenants of the first load that are neither synced nor out of reach
        self._stale: dict[str, float] = {}  # as the metric has it
        wanted = config.super_cluster
        self._grants = Grants(config.tenants, vouches=wanted is not None and wanted.pods and not wanted.node)
        self.ownership = Ownership()
        self.policies = Policies(
            judge=self._grants.problem,
            matched=lambda override: self.tenants.matched(override),
            patch=self._request,
            changed=self._regrant,
        )
        if wanted is None:
            self.ownership.set_known()
        self.policies.known = wanted is None or not wanted.tenant_policies
        restricted = any(source.directory is None for source in config.tenants.sources)
        self._access = SuperAccess(config.super_cluster, guarded=restricted) if config.super_cluster else None
        if self._access is not None:
            self.placement.date(self._access.age)
            self._access.age.announce = self._caught_up
        self._vouched = Vouched()
        self._owners = Owners(catalogue.spoken_for(config.tenants.sources))
        for state in ("synced", "restored", "not-synced"):
            metrics.TENANTS.labels(state).set_function(partial(self._count, state))
        self._memory = (
            Memory(Path(config.state_directory), self.store, policy_of=self._policy_of, rights_of=self._rights_of)
            if config.state_directory
            else None
        )
        self._sharding = self._shared()
        self._vouched.subscribe(lambda uid: self.ownership.put_api_servers(uid, self._vouched.api_servers(uid)))
        self.tenants = Tenants(
            catalogue.made(config.tenants.sources, self._access, self._owners, self._vouched),
            servers=self._api_servers(),
            vouched=self._vouched,
            store=self.store,
            placement=self.placement,
            grants=self._grants,
            ownership=self.ownership,
            rules_known=lambda: self.policies.known,
            scope=Scope.PLACED if config.super_cluster and config.super_cluster.pods else Scope.EVERY_NODE_UNTIL_PLACED,
            completed=self._judge_ready,
            changed=self.policies.touch,
            share=self._sharding,
            recall=self._memory.recall if self._memory is not None and self._sharding is not None else lambda uid: None,
        )

    def _shared(self) -> Sharding | None:
        """How brains share tenants; None: they do not."""
        config, access = self._config.sharding, self._access
        if config is None or access is None:
            return None
        timing = Timing(config.lease_seconds, config.renew_seconds, config.retry_seconds)
        me = f"{_HOST.sub('-', socket.gethostname().lower())[:40]}-{self.store.brain_id}"
        leases = LeaseClient(
            lambda: access.credentials,
            namespace=config.namespace,
            me=me,
            shards=config.shards,
            lease_seconds=config.lease_seconds,
            timeout=config.renew_seconds / 2,
        )
        return Sharding(
            leases,
            me=me,
            shards=config.shards,
            timing=timing,
            ready=lambda: self.placement.ready,
            changed=self._reshare,
        )

    async def run(self, stop: asyncio.Event | None = None) -> None:
        """Run until SIGTERM or SIGINT, or until `stop` is set (then signals are the caller's).

        Raises ConfigError for an address or a credential that cannot be used, AdminError, and server.serve's errors.
        """
        await until_stopped(self._serve, stop)
        _log.info("ended; nodes keep what they have", brain=self.store.brain_id)

    async def _serve(self) -> None:
        config = self._config
        if self._memory is not None:
            # With shards a tenant is read when its shard comes: to hold the others' would be to hold all.
            remembered = 0 if self._sharding is not None else await asyncio.to_thread(self._memory.load)
            _log.info("last good contents were read", path=config.state_directory, tenants=remembered)
        if config.super_cluster is not None and self._access is not None:
            self._super = SuperClusterFeed(
                config.super_cluster,
                self._access,
                store=self.store,
                placement=self.placement,
                ownership=self.ownership,
                policies=self.policies,
                attribution=self._owners,
                vouched=self._vouched,
                listed=self._judge_ready,
            )
        view = look.View(
            store=self.store,
            placement=self.placement,
            feeds=self._feeds,
            nodes=self.distributor.nodes,
            problems=self._problems,
            sharding=self._sharding.status if self._sharding is not None else None,
        )
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._serving_metrics())
            await stack.enter_async_context(admin.serve(config.admin_socket, look.routes(view)))
            stack.callback(self.store.subscribe(self._measure))
            if self._memory is not None:
                stack.callback(self.store.subscribe(self._memory.changed))
                stack.push_async_callback(self._memory.flush)
            _log.info("starting", brain=self.store.brain_id, super_cluster=config.super_cluster is not None)
            async with asyncio.TaskGroup() as group:
                if self._super is not None and self._access is not None:
                    group.create_task(self._access.run())
                    group.create_task(self._access.age.run())
                    group.create_task(self._super.run())
                    group.create_task(self.policies.run())
                group.create_task(self.tenants.run())
                group.create_task(self._keep_time())
                if self._sharding is not None:
                    group.create_task(self._sharding.run())
                if self._memory is not None:
                    group.create_task(self._memory.run())
                if self._listening:
                    from vcproxy.brain.server import serve  # gRPC, which `vcproxy run` does without

                    group.create_task(serve(self.distributor, config.listen))

    def _feeds(self) -> dict[str, Feed]:
        feeds = dict(self.tenants.feeds)
        if self._super is not None and self._super.feed is not None:
            feeds[self._super.feed.tenant.uid] = self._super.feed
        return feeds

    def _problems(self) -> list[Problem]:
        found = self._super.problems() if self._super is not None else []
        if self._access is not None:
            found.extend(self._access.expiries.problems())
            if self._access.problem:
                found.append(Problem("superCluster.kubeconfig", self._access.problem))
        found.extend(Problem(subject, message) for subject, message in self.policies.problems())
        if self._sharding is not None and self._sharding.problem:
            found.append(Problem("sharding", self._sharding.problem))
        return [*found, *self.tenants.problems()]

    def _policy_of(self, uid: str) -> Policy | None:
        """None while it is not known."""
        if uid == SUPER_UID:
            return UNRESTRICTED
        return self.tenants.policy(uid) if self.policies.known and self.ownership.known else None

    def _rights_of(self, uid: str, policy: Policy) -> Rights | None:
        return Rights(self.ownership, uid, policy) if policy.judges_backends else None

    def _regrant(self) -> None:
        self._grants.set_policies(self.policies.overrides)
        self.tenants.regrant()

    async def _request(self, method: str, path: str, **how: Any) -> bytes:
        if self._access is None:
            raise RuntimeError("there is no super cluster, and so no TenantPolicy")
        return await self._access.client.request(method, path, **how)

    def _api_servers(self) -> ApiServers:
        def known() -> bool:
            return self._access is None or (bool(self._access.addresses) and self._located)

        try:
            return ApiServers(
                self._config.tenants.policy.api_servers, access=self._access, placement=self.placement, known=known
            )
        except AddressError as error:
            raise ConfigError(f"tenants.policy.apiServers: {error}") from error

    @property
    def _located(self) -> bool:
        """Nodes, and where pods run, have been read."""
        return self._super is not None and self._super.complete

    def _judge_ready(self) -> None:
        located = self._config.super_cluster is None or self._located
        if located and not self.ownership.known:
            self.ownership.set_known()
            self.tenants.regrant()
        if located and self.tenants.complete and not self.placement.ready:
            self.placement.set_ready()
            if self._memory is not None:
                self._memory.prune({*self.tenants.uids, *self.store.tenants()})
            _log.info("ready: every tenant is known, and where pods run", tenants=len(self.tenants.uids))
            self._await_load()

    def _caught_up(self) -> None:
        """What is known of the super cluster is as new as what nodes were told."""
        self.placement.announce()
        for uid in list(self.store.tenants()):
            self.store.announce(uid)

    def _reshare(self) -> None:
        self._litter |= self.tenants.reshare()
        self._began = time.monotonic()
        self._await_load()

    def _await_load(self) -> None:
        self._loading = {uid for uid in self._feeds() if self._awaited(uid)}
        self._judge_loaded()

    def _awaited(self, uid: str) -> bool:
        """Whether a tenant is neither synced nor out of reach."""
        stored = self.store.tenants().get(uid)
        return stored is not None and not stored.synced and stored.stale_since is None

    def _judge_loaded(self) -> None:
        """Once no tenant of the first load is waited for any more."""
        if not self._loading:
            garbage.settled()
            held = self.store.tenants().values()
            seconds, synced = time.monotonic() - self._began, sum(stored.synced for stored in held)
            _log.info("loaded", tenants=len(held), synced=synced, seconds=round(seconds, 3))

    async def _keep_time(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.placement.expire()
            if self._litter and not self._loading:
                self._litter = False
                garbage.sweep()

    def _count(self, state: str) -> float:
        """For the metric, when and in the thread that it is rendered."""
        return sum(_state(stored) == state for stored in list(self.store.tenants().values()))

    def _measure(self, uid: str) -> None:
        stored = self.store.tenants().get(uid)
        since = stored.stale_since or 0.0 if stored is not None else None
        if since != self._stale.get(uid):
            if since is None:
                del self._stale[uid]
            else:
                self._stale[uid] = since
                metrics.STALE.labels(uid).set(since)
        if uid in self._loading and not self._awaited(uid):
            self._loading.remove(uid)
            self._judge_loaded()

    @contextlib.asynccontextmanager
    async def _serving_metrics(self) -> AsyncIterator[None]:
        async def alive(_: web.Request) -> web.Response:
            return web.json_response({"status": "ok"})

        async def ready(_: web.Request) -> web.Response:
            return web.json_response({"ready": self.placement.ready}, status=200 if self.placement.ready else 503)

        address = self._config.metrics_address
        handlers = {"/metrics": metrics.show, "/healthz": alive, "/readyz": ready}
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(metrics.serve(address, handlers))
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f'metricsAddress {address}: cannot be served on: {error}: choose another, or "" for none'
                ) from error
            yield


def _state(stored: Stored) -> str:
    if stored.restored:
        return "restored"
    return "synced" if stored.synced else "not-synced"
