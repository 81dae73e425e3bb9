"""Rolling changes in two tenants at once: whatever happened, the kernel ends where the API servers are.

EndpointSlices are made by real kube-controller-managers from Pods. A seeded generator creates Pods, makes them ready
and unready, lets them terminate and deletes them, and creates, changes and deletes Services, in both tenants at once and
with the same names and ClusterIPs. Now and then it pauses until the controllers have caught up with the Pods; then the
kernels must have what the API servers have. All the while clients dial a Service of each tenant with one endpoint that
stays and others that come and go: none of their connections may fail. (TCP, where a lost packet is seen as a repeated
one. A datagram may be lost with the endpoint that it was sent to: flows of an endpoint that leaves are cut off.)

VCPROXY_CHURN_SECONDS lengthens it, VCPROXY_CHURN_SEED repeats a run.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from e2e.apiclient import ApiClient
from e2e.conftest import NamespaceFactory
from e2e.objects import Object, node, pod, pod_status, service, service_port
from e2e.oracle import differences, wanted
from e2e.polling import eventually
from e2e.traffic import Traffic
from e2e.world import PORT, PORTS, TARGET, World, fresh_vips, uid_of

pytestmark = [pytest.mark.controlplane, pytest.mark.packets]

SECONDS = float(os.environ.get("VCPROXY_CHURN_SECONDS", "45"))
SEED = int(os.environ.get("VCPROXY_CHURN_SEED", "20261123"))
TENANTS = ("acme", "globex")
APPS = ("red", "green", "blue")
MOST_PODS = 25
BURST = 20
"""Changes between two quiet points."""


class Tenant:
    """One tenant's Pods and Services, and what may happen to them next."""

    def __init__(self, world: World, name: str, namespace: str, vips: dict[str, tuple[str, str]]) -> None:
        self.world, self.name, self.namespace, self.vips = world, name, namespace, vips
        self.client: ApiClient = world.planes[name].client
        self._serial = 0

    def begin(self, stable: tuple[str, str]) -> None:
        """Nodes, and a Service `stable` with an endpoint that stays."""
        for made in self.world.nodes.values():
            self.client.create(node(made.name))
        self.client.create(self._service("stable", stable))
        for role in ("web-1", "web-2", "web-3"):
            self.create_pod(role, "stable", *self._address(role), where=self.world.pods[self.name, role].node)

    def end(self) -> None:
        for made in self.world.nodes.values():
            self.client.delete("Node", made.name)

    def act(self, rng: random.Random) -> None:
        """One change."""
        act = rng.choices(
            (self._come, self._turn, self._terminate, self._vanish, self._flap, self._toggle_service, self._reshape),
            weights=(30, 20, 10, 10, 10, 10, 10),
        )[0]
        act(rng)

    # --- Pods

    def create_pod(self, name: str, app: str, *addresses: str, where: str) -> None:
        ports = [{"name": "http", "containerPort": TARGET}]
        self.client.create(pod(name, namespace=self.namespace, node=where, labels={"app": app}, ports=ports))
        self.client.patch_status("Pod", name, pod_status(*addresses), self.namespace)

    def _come(self, rng: random.Random) -> None:
        if len(self._roaming()) >= MOST_PODS:
            return self._vanish(rng)
        self._serial += 1
        where = rng.choice(list(self.world.nodes.values())).name
        number = self._serial
        addresses = f"10.250.{number // 250}.{number % 250 + 1}", f"fd00:250::{number:x}"
        self.create_pod(f"roaming-{number}", rng.choice(APPS), *addresses, where=where)
        return None

    def _turn(self, rng: random.Random) -> None:
        """A Pod becomes ready or not."""
        if found := self._some(rng):
            addresses = [said["ip"] for said in found["status"]["podIPs"]]
            self._status(found["metadata"]["name"], addresses, ready=rng.random() < 0.6)

    def _flap(self, rng: random.Random) -> None:
        """An endpoint of `stable`, not the one that stays, becomes ready or not: it answers either way."""
        role = rng.choice(("web-2", "web-3"))
        self._status(role, self._address(role), ready=rng.random() < 0.5)

    def _terminate(self, rng: random.Random) -> None:
        """A Pod is asked to end, and goes on for a while: its kubelet would end it."""
        if found := self._some(rng):
            self.client.delete("Pod", found["metadata"]["name"], self.namespace, grace_period=30)

    def _vanish(self, rng: random.Random) -> None:
        if found := self._some(rng):
            self.client.delete("Pod", found["metadata"]["name"], self.namespace, grace_period=0)

    def _status(self, name: str, addresses: list[str] | tuple[str, ...], *, ready: bool) -> None:
        self.client.patch_status("Pod", name, pod_status(*addresses, ready=ready), self.namespace)

    def _some(self, rng: random.Random) -> Object | None:
        pods = self._roaming()
        return rng.choice(pods) if pods else None

    def _roaming(self) -> list[Object]:
        return self.client.list("Pod", self.namespace, labels="app!=stable").items

    def _address(self, role: str) -> tuple[str, str]:
        made = self.world.pods[self.name, role]
        return made.ip4, made.ip6

    # --- Services

    def _service(self, app: str, vips: tuple[str, str]) -> Object:
        named = [service_port(port, name=said, protocol=protocol, target=to) for said, protocol, port, to in PORTS]
        return service(app, namespace=self.namespace, ports=named, selector={"app": app}, cluster_ips=vips)

    def _toggle_service(self, rng: random.Random) -> None:
        """A Service is deleted, or created with the ClusterIPs it had."""
        app = rng.choice(APPS)
        held = {item["metadata"]["name"] for item in self.client.list("Service", self.namespace).items}
        if app in held:
            self.client.delete("Service", app, self.namespace)
        else:
            self.client.create(self._service(app, self.vips[app]))

    def _reshape(self, rng: random.Random) -> None:
        """A Service gets other ports, another selector, or another policy."""
        held = [item for item in self.client.list("Service", self.namespace).items if item["metadata"]["name"] in APPS]
        if not held:
            return
        number = rng.randrange(80, 90)
        spec = rng.choice(
            (
                {"selector": {"app": rng.choice(APPS)}},
                {"internalTrafficPolicy": rng.choice(("Local", "Cluster"))},
                {
                    "ports": [
                        {"name": "http", "protocol": "TCP", "port": number, "targetPort": "http"},
                        {"name": "more", "protocol": "TCP", "port": number + 10, "targetPort": number},
                    ]
                },
            )
        )
        self.client.patch("Service", rng.choice(held)["metadata"]["name"], {"spec": spec}, self.namespace)

    # --- quiet points

    def caught_up(self) -> bool:
        """Whether the controller has made of Pods and Services what it should: the ready endpoints of each Service."""
        pods = self.client.list("Pod", self.namespace).items
        for item in self.client.list("Service", self.namespace).items:
            app, name = item["spec"]["selector"]["app"], item["metadata"]["name"]
            ready = {
                said["ip"]
                for found in pods
                if found["metadata"]["labels"]["app"] == app
                and "deletionTimestamp" not in found["metadata"]
                and any(one == {"type": "Ready", "status": "True"} for one in _conditions(found))
                for said in found["status"]["podIPs"]
            }
            slices = self.client.list("EndpointSlice", self.namespace, labels=f"kubernetes.io/service-name={name}")
            told = {
                address
                for found in slices.items
                for one in found["endpoints"] or ()
                if one["conditions"]["ready"]
                for address in one["addresses"]
            }
            if told != ready:
                return False
        return True


def _conditions(found: Object) -> list[Object]:
    return [{"type": one["type"], "status": one["status"]} for one in found["status"].get("conditions", ())]


@pytest.fixture
def tenants(flat_world: World, fresh_namespace: NamespaceFactory) -> Iterator[dict[str, Tenant]]:
    namespace = fresh_namespace(*(flat_world.planes[name].client for name in TENANTS))
    vips = {app: fresh_vips() for app in APPS}
    with ExitStack() as stack:
        found = {}
        for name in TENANTS:
            flat_world.planes[name].start_controller_manager()
            found[name] = Tenant(flat_world, name, namespace, vips)
            stack.callback(found[name].end)
        yield found


@pytest.mark.timeout(SECONDS + 120)
def test_kernels_end_where_the_api_servers_are(flat_world: World, tenants: dict[str, Tenant]) -> None:
    world, rng = flat_world, random.Random(SEED)
    stable = fresh_vips()
    for tenant in tenants.values():
        tenant.begin(stable)
    quiet(world, tenants)
    with ExitStack() as stack:
        clients = {
            name: [
                stack.enter_context(Traffic(world.pods[name, place], vip, PORT))
                for place, vip in (("client-one", stable[0]), ("client-two", stable[1]))
            ]
            for name in TENANTS
        }
        end, changes, points = time.monotonic() + SECONDS, 0, 0
        while time.monotonic() < end or points < 3:
            for _ in range(BURST):
                tenants[rng.choice(TENANTS)].act(rng)
                changes += 1
            quiet(world, tenants)
            points += 1
        for traffic in (one for both in clients.values() for one in both):
            traffic.more()
    for name, both in clients.items():
        for traffic in both:
            assert not traffic.losses, f"{name}, seed {SEED}, {changes} changes: {traffic}"
            assert {answer.partition("/")[0] for answer in traffic.answers} == {name}
    final = {name: world.kernel(name) for name in world.nodes}
    for name in tenants:
        services, slices = world.objects(name)
        for place, kernel in final.items():
            want = wanted(services, slices, node=world.nodes[place].name, public=False)
            assert differences(want, kernel.forwarding[uid_of(name)]) == []


def quiet(world: World, tenants: dict[str, Tenant]) -> None:
    """Wait until the controllers have caught up with the Pods, then until the kernels have with the API servers."""
    for tenant in tenants.values():
        eventually(tenant.caught_up, within=30, every=0.05, what=f"slices of {tenant.name} as its Pods")
    world.converged(*tenants)
