"""The super cluster's part of a brain: its credentials, its own Services as tenant `super`, its Pods and Nodes.

One feed follows all of it over one connection's worth of credentials. The kubeconfig is the operator's own file and may
be rewritten at any time (kubelet-style certificates, an API server that moved), so it is read again now and then; a
service account's token rotates by itself in the client.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from vcproxy.brain.config import SuperCluster
from vcproxy.brain.feed import Feed
from vcproxy.brain.guard import UNRESTRICTED
from vcproxy.brain.inputs import TENANT_KINDS, ApiInput
from vcproxy.brain.placement import Placement, Scope
from vcproxy.brain.sources import Kind, Problem
from vcproxy.brain.sources.supercluster import Whereabouts
from vcproxy.brain.store import Store
from vcproxy.kube.client import Limits as ClientLimits
from vcproxy.kube.decode import NODES, PODS, Resource
from vcproxy.kube.errors import KubeconfigError
from vcproxy.kube.kubeconfig import Credentials, in_cluster, load_kubeconfig_file
from vcproxy.kube.reflector import Broken, Event, Recovered
from vcproxy.kube.servers import normalise_server
from vcproxy.model.tenant import SUPER_UID, Tenant
from vcproxy.ops import logs
from vcproxy.ops.configfile import ConfigError

READ_AGAIN_SECONDS = 10.0

_log = logs.get("supercluster")


class SuperClusterFeed:
    """Follows the super cluster; `await run()` within a TaskGroup. `listed` is called when Nodes, and Pods if they are
    asked for, were read.

    `feed`: of the tenant `super`; None where its Services are not to be proxied: then a feed of pods and nodes alone
    runs, on a store of its own. Raises ConfigError when the credentials cannot be used.
    """

    def __init__(self, config: SuperCluster, *, store: Store, placement: Placement, listed: Callable[[], None]) -> None:
        self._config = config
        self._placement = placement
        self._listed = listed
        self._whereabouts = Whereabouts(placement, origin=SUPER_UID)
        self._broken: dict[Kind, Broken] = {}
        self._problem = ""
        try:
            self._credentials = credentials_of(config)
            whereabouts = _whereabouts(config)
            self._wanted = {resource.kind for resource in whereabouts}
            resources = (*TENANT_KINDS, *whereabouts) if config.services else whereabouts
            self._input = ApiInput(self._credentials, tenant=SUPER_UID, resources=resources, limits=ClientLimits())
        except KubeconfigError as error:
            raise ConfigError(f"superCluster: {error}; or set superCluster: null if there is none") from error
        self._runner = Feed(
            Tenant(SUPER_UID, SUPER_UID),
            self._input,
            store=store if config.services else Store(),
            policy=UNRESTRICTED,
            observe=self._observe,
        )
        self.feed = self._runner if config.services else None
        if config.services:
            placement.set_scope(SUPER_UID, Scope.EVERY_NODE)
            # Known from the start: a node that holds it from an earlier run is not told to drop it.
            store.add_tenant(Tenant(SUPER_UID, SUPER_UID))

    @property
    def complete(self) -> bool:
        """All that says where pods run has been read once."""
        return self._whereabouts.listed >= self._wanted

    def problems(self) -> list[Problem]:
        """What keeps pods and nodes from being followed, and a kubeconfig that cannot be used any more."""
        found = [Problem("super cluster", f"{kind}s: {event.error}") for kind, event in self._broken.items()]
        return [*found, *([Problem("superCluster.kubeconfig", self._problem)] if self._problem else ())]

    async def run(self) -> None:
        """Follow it for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._runner.run())
            group.create_task(self._read_again())

    def _observe(self, kind: Kind, event: Event[Any]) -> None:
        if kind not in ("Pod", "Node"):
            return
        if isinstance(event, Broken):
            self._broken[kind] = event
        elif isinstance(event, Recovered):
            self._broken.pop(kind, None)
        complete = self.complete
        self._whereabouts.take(kind, event)
        if self.complete and not complete:
            self._placement.demand_nodes()
            self._listed()

    async def _read_again(self) -> NoReturn:
        while True:
            await asyncio.sleep(READ_AGAIN_SECONDS)
            try:
                credentials = await asyncio.to_thread(credentials_of, self._config)
                if credentials != self._credentials:
                    await self._input.rotate(credentials)
                    self._credentials = credentials
                    _log.info("credentials rotated", tenant=SUPER_UID)
                self._problem = ""
            except KubeconfigError as error:
                self._problem = f"{error}; the last good credentials stay in use"


def _whereabouts(config: SuperCluster) -> tuple[Resource[Any], ...]:
    """The kinds that say where pods run and what nodes are; for one node alone the API server does the choosing."""
    nodes, pods = NODES, PODS
    if config.node:
        nodes = replace(nodes, params={"fieldSelector": f"metadata.name={config.node}"})
        pods = replace(pods, params={"fieldSelector": f"spec.nodeName={config.node}"})
    return (nodes, pods) if config.pods else (nodes,)


def credentials_of(config: SuperCluster) -> Credentials:
    """What the configuration says how to reach the super cluster with. Reads files. Raises KubeconfigError."""
    found = load_kubeconfig_file(Path(config.kubeconfig)) if config.kubeconfig else in_cluster()
    return replace(found, server=normalise_server(config.server)) if config.server else found
