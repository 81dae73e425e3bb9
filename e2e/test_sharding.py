"""Brains that share tenants by Leases of a real API server: they spread, they die in every way, they come and go.

Besides the two tenants with pods there are others that are placed on both nodes and read the first one's API server:
one change there is a change of each, wherever its shard is. So that everything is right means that every shard is fed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.conftest import NamespaceFactory, PlaneFactory
from e2e.controlplane import ControlPlane
from e2e.hosting import DEPLOY
from e2e.objects import pod, pod_status
from e2e.polling import eventually
from e2e.scene import Scene
from e2e.traffic import Traffic
from e2e.world import LABEL, PORT, World, running
from vcproxy.brain.election import Act, Step, shard_of
from vcproxy.brain.leases import LeaseClient
from vcproxy.kube.errors import Conflict, Forbidden
from vcproxy.kube.kubeconfig import load_kubeconfig_file

pytestmark = [pytest.mark.controlplane, pytest.mark.packets]

BRAINS = ("brain", "brain-2", "brain-3", "brain-4")
SHARDS = 16
LEASE = 15
SHARING = {"shards": SHARDS, "leaseSeconds": LEASE, "renewSeconds": 10, "retrySeconds": 1}
MORE = [f"more-{number}" for number in range(10)]
SOON = 15.0
"""Seconds that a change may take besides a Lease's: rounds of the election, lists of what was taken, and a busy machine."""


class Shards:
    """A world whose tenants several brains share; the first three run."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cluster = world.cluster
        self.up = ["brain"]

    def start(self, *names: str) -> None:
        for name in names:
            self.cluster.start_brain(name)
            self.up.append(name)
        self.settled()

    def held(self, name: str) -> set[int]:
        return set(self.cluster.ask(name)["sharding"]["held"])

    def settled(self, within: float = 40.0) -> None:
        """Wait until the brains that are up hold all shards, each its share."""

        def spread() -> bool:
            held = [self.held(name) for name in self.up]
            even = max(map(len, held)) - min(map(len, held)) <= 1
            return even and sorted(shard for some in held for shard in some) == list(range(SHARDS))

        self.cluster.wait(f"{self.up} share all shards", spread, within)

    def feeder(self, tenant: str) -> str:
        """The brain that feeds a tenant."""
        shard = shard_of(self.world.uid(tenant), SHARDS)
        return next(name for name in self.up if shard in self.held(name))

    def tenants(self, name: str) -> set[str]:
        return {row["uid"] for row in self.cluster.ask(name, "/tenants")} - {"super"}


@contextmanager
def sharing(directory: Path, super_plane: ControlPlane, namespace: str, **planes: ControlPlane) -> Iterator[Shards]:
    with running(
        directory,
        super_plane,
        flat=planes,
        replicas=BRAINS,
        sharding={**SHARING, "namespace": namespace},
        tenants={"policy": {"denyOtherTenantsPods": False}},  # others lead to the pods of acme
        tenantBackends={"otherTenantsPods": True},
    ) as world:
        client = super_plane.client
        numbers = itertools.count(1)
        for tenant in MORE:
            for where, node in world.nodes.items():
                name, number = f"{tenant}-{where}", next(numbers)
                client.create(pod(name, namespace=world.namespace, node=node.name, labels={LABEL: tenant}))
                client.patch_status("Pod", name, pod_status(f"10.99.0.{number}"), world.namespace)
            world.planes[tenant] = planes["acme"]
            world.give_kubeconfig(tenant, planes["acme"].kubeconfig)
        shards = Shards(world)
        shards.start("brain-2", "brain-3")
        world.converged(within=30)
        yield shards


@pytest.fixture
def shards(
    super_plane: ControlPlane,
    tenant_planes: tuple[ControlPlane, ControlPlane],
    fresh_namespace: NamespaceFactory,
    tmp_path: Path,
) -> Iterator[Shards]:
    acme, globex = tenant_planes
    with sharing(tmp_path, super_plane, fresh_namespace(super_plane.client), acme=acme, globex=globex) as made:
        yield made


def test_tenants_are_spread_and_each_node_has_all_of_its_own(shards: Shards, fresh_namespace: NamespaceFactory) -> None:
    world = shards.world
    scene = Scene(world, "acme", fresh_namespace)
    assert sorted(len(shards.held(name)) for name in shards.up) == [5, 5, 6]
    followed = [shards.tenants(name) for name in shards.up]
    assert all(followed), "each follows some"
    assert sorted(uid for some in followed for uid in some) == sorted(map(world.uid, ["acme", "globex", *MORE]))
    for node in world.nodes.values():
        status = shards.cluster.ask(node.name)
        assert status["healthy"], status
        assert sum(row["tenants"] for row in status["brains"]) == len(MORE) + 2
        assert sum(row["brain"] is not None for row in status["brains"]) == 3
    scene.endpoints("web-3")
    world.converged()
    assert scene.answers() == {"acme/web-3"}
    # A fourth takes its share, of each some, and nothing moves between the others.
    before = {name: shards.held(name) for name in shards.up}
    with Traffic(world.pods["acme", "client-one"], scene.vips[0], PORT, "UDP") as traffic:
        shards.start("brain-4")
        scene.endpoints("web-1", "web-3")
        world.converged()
        traffic.more()
        assert not traffic.losses
    assert [len(shards.held(name)) for name in shards.up] == [4, 4, 4, 4]
    assert all(shards.held(name) < before[name] for name in before)


def killed(shards: Shards, name: str) -> Callable[[], None]:
    shards.cluster.kill(name)
    return lambda: shards.start(name)


def ended(shards: Shards, name: str) -> Callable[[], None]:
    shards.cluster.end(name)
    return lambda: shards.start(name)


def stopped(shards: Shards, name: str) -> Callable[[], None]:
    shards.cluster.freeze(name)

    def go_on() -> None:
        shards.cluster.thaw(name)
        shards.up.append(name)
        shards.settled()

    return go_on


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("fate", "wait"), [(killed, LEASE), (stopped, LEASE), (ended, 0.0)])
def test_a_brain_that_goes_is_replaced_and_nobody_notices(
    shards: Shards, fresh_namespace: NamespaceFactory, fate: Callable[..., Callable[[], None]], wait: float
) -> None:
    world = shards.world
    scene = Scene(world, "acme", fresh_namespace)
    place = world.pods["acme", "client-one"]
    with Traffic(place, scene.vips[0], PORT, "TCP") as tcp, Traffic(place, scene.near[1], PORT, "UDP") as udp:
        name = shards.feeder("acme")
        others_before = {other: shards.held(other) for other in shards.up if other != name}
        back = fate(shards, name)
        shards.up.remove(name)
        began = time.monotonic()
        scene.endpoints("web-3")
        world.converged(within=wait + SOON)
        print(f"{fate.__name__}: the change was everywhere after {time.monotonic() - began:.1f} s")
        shards.settled()
        assert all(held <= shards.held(other) for other, held in others_before.items()), "nothing else moved"
        scene.endpoints("web-2", "web-3")
        world.converged()
        back()
        scene.endpoints("web-1")
        world.converged()
        for traffic in (tcp, udp):
            traffic.more()
            assert not traffic.losses, str(traffic)
    assert scene.answers() == {"acme/web-1"}
    rows: list[dict[str, Any]] = [
        row for place in world.nodes.values() for row in shards.cluster.ask(place.name)["tenants"]
    ]
    assert not [row for row in rows if row["error"] or row["behind"]]


@pytest.mark.timeout(240)
def test_without_the_super_clusters_api_server_nodes_keep_what_they_have_and_then_get_on(
    control_plane: PlaneFactory,
    tenant_planes: tuple[ControlPlane, ControlPlane],
    fresh_namespace: NamespaceFactory,
    tmp_path: Path,
) -> None:
    super_plane, (acme, globex) = control_plane("super"), tenant_planes
    with sharing(tmp_path, super_plane, "kube-system", acme=acme, globex=globex) as shards:
        away_and_back(shards, super_plane, Scene(shards.world, "acme", fresh_namespace))


def away_and_back(shards: Shards, super_plane: ControlPlane, scene: Scene) -> None:
    world = shards.world
    followed = {name: shards.tenants(name) for name in shards.up}
    with Traffic(world.pods["acme", "client-two"], scene.vips[1], PORT, "TCP") as traffic:
        super_plane.freeze()
        try:
            shards.cluster.wait("no shard is held", lambda: not any(map(shards.held, shards.up)), LEASE + SOON)
            kept = {name: set(shards.cluster.ask(name)["sharding"]["kept"]) for name in shards.up}
            assert sorted(shard for some in kept.values() for shard in some) == list(range(SHARDS))
            alive = {name: world.kernel(name).forwarding["dir-acme"] for name in world.nodes}
            scene.endpoints("web-3")
            uid, name = world.uid("acme"), next(name for name in shards.up if world.uid("acme") in followed[name])

            def followed_still() -> bool:
                rows = {row["uid"]: row for row in shards.cluster.ask(name, "/tenants")}
                return bool(rows[uid]["updatedAt"] > began)

            began = time.time() - 1
            eventually(followed_still, what="the brain that kept the shard follows its tenants")
            assert {name: world.kernel(name).forwarding["dir-acme"] for name in world.nodes} == alive
            traffic.more()
        finally:
            super_plane.thaw()
        world.converged(within=SOON + 10)
        shards.settled()
        assert {name: shards.tenants(name) for name in shards.up} == followed, "no shard moved"
        traffic.more()
        assert not traffic.losses, str(traffic)
    assert scene.answers() == {"acme/web-3"}


async def test_the_rights_that_deploy_gives_are_what_leases_take(
    super_plane: ControlPlane, fresh_namespace: NamespaceFactory, tmp_path: Path
) -> None:
    """Each step with a real API server: creation, conditions, removal; and nothing in other namespaces."""
    namespace, other = fresh_namespace(super_plane.client), fresh_namespace(super_plane.client)
    user = f"brain-{namespace}"
    for found in yaml.safe_load_all((DEPLOY / "brain.yaml").read_text()):
        if found["kind"] in ("Role", "RoleBinding"):
            found["metadata"]["namespace"] = namespace
            if found["kind"] == "RoleBinding":
                found["subjects"] = [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}]
            super_plane.client.create(found)
    credentials = load_kubeconfig_file(super_plane.write_kubeconfig(tmp_path / "brain", user=user))

    def client(me: str, where: str = namespace) -> LeaseClient:
        return LeaseClient(lambda: credentials, namespace=where, me=me, shards=4, lease_seconds=15, timeout=10)

    a, b, elsewhere = client("a"), client("b"), client("a", other)
    try:
        first = await a.do(Step(Act.HOLD, 3, None))
        assert first is not None
        assert await a.list() == [first]
        with pytest.raises(Conflict):
            await b.do(Step(Act.HOLD, 3, None))
        renewed = await a.do(Step(Act.HOLD, 3, first))
        assert renewed is not None
        assert (renewed.acquired, renewed.transitions) == (first.acquired, 0)
        with pytest.raises(Conflict):
            await b.do(Step(Act.HOLD, 3, first))
        taken = await b.do(Step(Act.HOLD, 3, renewed))
        assert taken is not None
        assert (taken.holder, taken.transitions, taken.seconds) == ("b", 1, 15)
        free = await b.do(Step(Act.RELEASE, 3, taken))
        assert free is not None
        assert free.holder == ""
        with pytest.raises(Conflict):
            await a.do(Step(Act.REMOVE, 3, taken))
        assert await a.do(Step(Act.REMOVE, 3, free)) is None
        with pytest.raises(Forbidden):
            await elsewhere.list()
    finally:
        for one in (a, b, elsewhere):
            await one.close()
