"""The super cluster's part of a brain: its credentials, its own Services as tenant `super`, its Pods and Nodes.

One feed follows all of it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

from vcproxy.brain.config import SuperCluster
from vcproxy.brain.feed import Feed
from vcproxy.brain.guard import UNRESTRICTED
from vcproxy.brain.inputs import TENANT_KINDS
from vcproxy.brain.ownership import Ownership
from vcproxy.brain.placement import Placement, Scope
from vcproxy.brain.policies import TENANT_POLICIES, Policies
from vcproxy.brain.sources import Kind, Problem
from vcproxy.brain.sources.attribution import Attribution
from vcproxy.brain.sources.supercluster import Whereabouts
from vcproxy.brain.store import Store
from vcproxy.brain.superaccess import SuperAccess
from vcproxy.brain.vouched import Vouched
from vcproxy.kube.decode import NODES, PODS, Resource
from vcproxy.kube.reflector import Broken, Event, Recovered
from vcproxy.model.tenant import SUPER_UID, Tenant


class SuperClusterFeed:
    """Follows the super cluster; `await run()` within a TaskGroup. `listed` is called when Nodes, and Pods if they are
    asked for, were read.

    `feed`: of the tenant `super`; None where its Services are not to be proxied: then a feed of pods and nodes alone
    runs, on a store of its own.
    """

    def __init__(
        self,
        config: SuperCluster,
        access: SuperAccess,
        *,
        store: Store,
        placement: Placement,
        ownership: Ownership,
        policies: Policies,
        attribution: Attribution,
        vouched: Vouched,
        listed: Callable[[], None],
    ) -> None:
        self._placement = placement
        self._listed = listed
        self._policies = policies
        self._whereabouts = Whereabouts(ownership.reading(placement), attribution=attribution, vouched=vouched)
        self._broken: dict[Kind, Broken] = {}
        whereabouts = _whereabouts(config)
        self._wanted = {resource.kind for resource in whereabouts}
        resources = (*TENANT_KINDS, *whereabouts) if config.services else whereabouts
        if config.tenant_policies:
            resources = (*resources, TENANT_POLICIES)
        self._runner = Feed(
            Tenant(SUPER_UID, SUPER_UID),
            access.input(resources),
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
        """What keeps pods and nodes from being followed."""
        return [Problem("super cluster", f"{kind}s: {event.error}") for kind, event in self._broken.items()]

    async def run(self) -> NoReturn:
        """Follow it for ever."""
        await self._runner.run()

    def _observe(self, kind: Kind, event: Event[Any]) -> None:
        if kind == "TenantPolicy":
            self._policies.take(event)
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


def _whereabouts(config: SuperCluster) -> tuple[Resource[Any], ...]:
    """The kinds that say where pods run and what nodes are; for one node alone the API server does the choosing."""
    nodes, pods = NODES, PODS
    if config.node:
        nodes = replace(nodes, params={"fieldSelector": f"metadata.name={config.node}"})
        pods = replace(pods, params={"fieldSelector": f"spec.nodeName={config.node}"})
    return (nodes, pods) if config.pods else (nodes,)
