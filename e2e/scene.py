"""One Service and its bystanders in a world, and the proof that a change of it touches nothing else.

What is touched the kernel itself tells (e2e.watching): the elements that were added and deleted while the change was
made must be of the Service's frontends and pools, before or after.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from e2e.apiclient import ApiClient
from e2e.conftest import NamespaceFactory
from e2e.objects import Object
from e2e.oracle import ANY_NODE, Kernel
from e2e.traffic import REQUESTS, Traffic
from e2e.watching import Concern, Watcher, concern
from e2e.world import PORT, World, fresh_vips, slices, uid_of, web
from vcproxy.lab import Reply


class Scene:
    """A Service `web` with two endpoints in a tenant, among bystanders: a Service with the same ClusterIPs and one with
    the same endpoints.
    """

    def __init__(self, world: World, tenant: str, fresh_namespace: NamespaceFactory) -> None:
        self.world, self.tenant = world, tenant
        self.client: ApiClient = world.planes[tenant].client
        self.other = "globex"
        self.namespace = fresh_namespace(self.client, world.planes[self.other].client)
        self.vips, self.near = fresh_vips(), fresh_vips()
        self.create("web", self.vips)
        self.create("beside", self.near)
        pods = world.some(self.other, "web-1", "web-2")
        world.planes[self.other].client.create_all(web("web", self.vips, pods, namespace=self.namespace))
        world.converged()

    def create(self, name: str, vips: tuple[str, str]) -> None:
        pods = self.world.some(self.tenant, "web-1", "web-2")
        self.client.create_all(web(name, vips, pods, namespace=self.namespace))

    def endpoints(self, *roles: str) -> None:
        """Make these the endpoints of `web`."""
        for item in slices("web", self.world.some(self.tenant, *roles), namespace=self.namespace):
            self.client.update(item)

    def patch(self, spec: Object) -> None:
        self.client.patch("Service", "web", {"spec": spec}, self.namespace)

    def answers(self, *, port: int = PORT) -> set[str]:
        """Who answers a client of the tenant on both nodes; whatever else happens is an error."""
        found = set()
        for where in ("client-one", "client-two"):
            for vip in self.vips:
                for request in REQUESTS.values():
                    outcomes = [request(self.world.pods[self.tenant, where], vip, port) for _ in range(10)]
                    assert all(isinstance(outcome, Reply) for outcome in outcomes), outcomes
                    found |= {outcome.pod for outcome in outcomes if isinstance(outcome, Reply)}
        return found

    def own(self, kernel: Kernel) -> set[Concern]:
        """What elements of `web` may be about, by what a kernel holds: frontends, addresses and pools."""
        uid = uid_of(self.tenant)
        zone = kernel.zones[uid]
        found = {Concern(zone, vip) for vip in self.vips}
        for frontend, answer in kernel.forwarding.get(uid, {}).items():
            if frontend.address not in (*self.vips, *ANY_NODE.values()):
                continue
            if frontend.address in self.vips:
                found.add(Concern(zone, frontend.address, frontend.port))
            else:
                found.add(Concern(port=frontend.port))
            if frontend in kernel.pools.get(uid, {}):
                found.add(Concern(pool=kernel.pools[uid][frontend]))
            if not isinstance(answer, str):
                found |= {Concern(zone, address) for address, _ in answer}
        return found

    def makes(self, change: Callable[[], object]) -> int:
        """Make a change, wait until all kernels have it, and see that only elements of `web` were touched, on each
        node at least one. Returns how many on all nodes, and sees that bystanders were served all the while.
        """
        world = self.world
        with ExitStack() as stack:
            watchers = {name: stack.enter_context(Watcher(node)) for name, node in world.nodes.items()}
            bystanders = [
                stack.enter_context(Traffic(world.pods[self.tenant, "client-one"], self.near[0], PORT, "UDP")),
                stack.enter_context(Traffic(world.pods[self.other, "client-one"], self.vips[1], PORT, "UDP")),
            ]
            before = {name: world.kernel(name) for name in world.nodes}
            change()
            world.converged()
            heard = {name: watcher.heard() for name, watcher in watchers.items()}
            after = {name: world.kernel(name) for name in world.nodes}
            for traffic in bystanders:
                traffic.more()
        for name, elements in heard.items():
            allowed = self.own(before[name]) | self.own(after[name])
            strange = [element for element in elements if concern(element) not in allowed]
            assert not strange, f"{name}: touched besides {self.tenant}'s web: {strange[:5]}"
            assert not watchers[name].others, f"{name}: {watchers[name].others[:5]}"
            assert elements, f"{name}: nothing was heard of the change"
        assert not any(traffic.losses for traffic in bystanders), [str(traffic) for traffic in bystanders]
        return sum(map(len, heard.values()))
