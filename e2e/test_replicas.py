"""Two brains: a node that is moved to the one that lags loses nothing, and gets on when that one does.

The second brain lives in a network namespace of its own and reaches the API servers through relays, which can be frozen:
its connections stand, nothing comes. So it does not know that it lags, as when a path is black-holed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from time import time
from typing import Any

import pytest

from e2e.conftest import NamespaceFactory, PlaneFactory
from e2e.controlplane import ControlPlane
from e2e.relay import Relay
from e2e.scene import Scene
from e2e.traffic import Traffic
from e2e.world import PORT, World, running
from vcproxy.lab import Client

pytestmark = [pytest.mark.controlplane, pytest.mark.packets]

FAR = "brain-far"


class Replicas:
    """A world with a second brain, that is not started; `freeze` cuts it off from all API servers."""

    def __init__(self, world: World, place: Client, relays: list[Relay]) -> None:
        self.world = world
        self._place = place
        self._relays = relays

    def start_far(self) -> None:
        cluster = self.world.cluster
        cluster.start_brain(FAR, ns=self._place.ns)

        def as_new() -> bool:
            rows = {name: {row["uid"]: row for row in cluster.ask(name, "/tenants")} for name in ("brain", FAR)}
            synced = all(row["synced"] for row in rows[FAR].values())
            digests = [{uid: row["digest"] for uid, row in of.items()} for of in rows.values()]
            return synced and digests[0] == digests[1] and cluster.ask(FAR)["ready"]

        cluster.wait("the second brain has all that the first has", as_new)

    def freeze(self) -> None:
        for one in self._relays:
            one.freeze()

    def thaw(self) -> None:
        for one in self._relays:
            one.thaw()

    def move_to(self, name: str) -> None:
        """Kill the brain that is not `name`, and wait until the agents are with the other."""
        cluster = self.world.cluster
        cluster.kill("brain" if name == FAR else FAR)
        identity = cluster.ask(name)["brain"]
        nodes = [node.name for node in self.world.nodes.values()]
        cluster.wait(f"agents are with {name}", lambda: all(cluster.ask(n)["brain"] == identity for n in nodes))

    def rows(self) -> list[dict[str, Any]]:
        """Of acme on both nodes."""
        return [dict(self.world.tenant_row("acme", where)) for where in self.world.nodes]


@contextmanager
def replicated(directory: Path, super_plane: ControlPlane, **planes: ControlPlane) -> Iterator[Replicas]:
    with ExitStack() as stack:
        world = stack.enter_context(running(directory, super_plane, flat=planes, replicas=("brain", FAR)))
        place = world.lab.client("far", "192.168.77.201", "fd77::201")
        relays = [
            stack.enter_context(Relay(place.ns, int(plane.url.rpartition(":")[2]))) for plane in world.planes.values()
        ]
        yield Replicas(world, place, relays)


def test_a_node_that_is_moved_to_a_replica_that_lags_keeps_what_it_has(
    super_plane: ControlPlane,
    tenant_planes: tuple[ControlPlane, ControlPlane],
    fresh_namespace: NamespaceFactory,
    tmp_path: Path,
) -> None:
    acme, globex = tenant_planes
    with replicated(tmp_path, super_plane, acme=acme, globex=globex) as replicas:
        world, cluster = replicas.world, replicas.world.cluster
        scene = Scene(world, "acme", fresh_namespace)
        replicas.start_far()
        replicas.freeze()
        scene.endpoints("web-3")  # and the pods behind web-1 and web-2 may be gone now
        world.converged()
        assert scene.answers() == {"acme/web-3"}
        alive = {name: world.kernel(name).forwarding for name in world.nodes}

        with Traffic(world.pods["acme", "client-one"], scene.vips[0], PORT, "TCP") as traffic:
            replicas.move_to(FAR)
            cluster.wait("the brain says that it lags", lambda: all(row["behind"] for row in replicas.rows()))
            assert {name: world.kernel(name).forwarding for name in world.nodes} == alive
            assert scene.answers() == {"acme/web-3"}
            traffic.more()
            assert not traffic.losses
            assert set(traffic.answers) == {"acme/web-3"}, "an endpoint that is gone came back"

            scene.endpoints("web-2", "web-3")
            assert {name: world.kernel(name).forwarding for name in world.nodes} == alive
            replicas.thaw()
            world.converged(within=30)
            traffic.more()
            assert not traffic.losses
        assert scene.answers() == {"acme/web-2", "acme/web-3"}
        assert not any(row["behind"] for row in replicas.rows())
        scene.makes(lambda: scene.endpoints("web-1"))


def test_what_a_node_was_told_of_itself_is_not_taken_back_by_a_replica_that_lags_on_the_super_cluster(
    super_plane: ControlPlane, tenant_planes: tuple[ControlPlane, ControlPlane], tmp_path: Path
) -> None:
    acme, globex = tenant_planes
    with replicated(tmp_path, super_plane, acme=acme, globex=globex) as replicas:
        world, cluster = replicas.world, replicas.world.cluster
        here = next(iter(world.nodes.values())).name
        client = next(pod for (tenant, _), pod in world.pods.items() if tenant == "acme" and pod.node == here)
        late = replace(client, name="late", ip4=client.ip4.rpartition(".")[0] + ".222", ip6=client.ip6 + "22")

        def knows() -> bool:
            return {late.ip4, late.ip6} <= {row["address"] for row in cluster.ask(here, "/addresses")}

        def problems() -> list[str]:
            return [row["problem"] for row in cluster.ask(here)["problems"]]

        replicas.start_far()
        replicas.freeze()
        world.tell_pod("late", "acme", late)
        cluster.wait("the node knows the new pod", knows)
        replicas.move_to(FAR)
        cluster.wait("the brain says that it lags", lambda: any("read pods up to" in said for said in problems()))
        assert knows(), "a pod that is there was taken away"
        replicas.thaw()
        cluster.wait("it does no longer", lambda: not problems(), 60)
        assert knows()
        world.super.client.delete("Pod", "late", world.namespace, grace_period=0)
        cluster.wait("a pod that is gone is taken away", lambda: not knows())


def test_replicas_agree_on_an_api_server_that_was_made_anew(
    super_plane: ControlPlane,
    tenant_planes: tuple[ControlPlane, ControlPlane],
    control_plane: PlaneFactory,
    fresh_namespace: NamespaceFactory,
    tmp_path: Path,
) -> None:
    acme, globex = control_plane("acme"), tenant_planes[1]
    with replicated(tmp_path, super_plane, acme=acme, globex=globex) as replicas:
        world, cluster = replicas.world, replicas.world.cluster
        scene = Scene(world, "acme", fresh_namespace)
        for _ in range(200):  # versions that the new etcd does not reach soon
            scene.patch({"sessionAffinity": "ClientIP"})
            scene.patch({"sessionAffinity": "None"})
        scene.endpoints("web-3")
        world.converged()
        replicas.start_far()
        acme.kill()
        acme.wipe_etcd()
        replicas.freeze()
        # For longer than a watch is resumed after (vcproxy.kube.reflector).
        cluster.wait(
            "it is away", lambda: (row := world.tenant_row("acme"))["stale"] and row["staleSince"] < time() - 3
        )
        acme.start()
        world.converged("acme", within=60)  # nothing is left but what a new API server has
        replicas.move_to(FAR)
        cluster.wait("the brain says that it lags", lambda: all(row["behind"] for row in replicas.rows()))
        assert world.disagreements(["acme"]) == []
        replicas.thaw()
        cluster.wait("it has read the new history", lambda: not any(row["behind"] for row in replicas.rows()), 60)
        world.converged("acme", within=60)


def test_a_restarted_brain_serves_a_tenant_whose_api_server_is_down(
    super_plane: ControlPlane,
    tenant_planes: tuple[ControlPlane, ControlPlane],
    control_plane: PlaneFactory,
    fresh_namespace: NamespaceFactory,
    tmp_path: Path,
) -> None:
    acme, globex = control_plane("acme"), tenant_planes[1]
    with running(tmp_path, super_plane, flat={"acme": acme, "globex": globex}) as world:
        cluster, node = world.cluster, world.nodes["one"]
        scene = Scene(world, "acme", fresh_namespace)
        scene.endpoints("web-3")
        world.converged()
        before = {name: world.kernel(name).forwarding["dir-acme"] for name in world.nodes}
        file = tmp_path / "brain-state" / "dir-acme.tenant"

        def remembered() -> bool:
            return file.exists() and file.stat().st_mtime > world.tenant_row("acme")["updatedAt"]

        cluster.wait("the brain has written it down", remembered, 40)
        acme.freeze()
        for name in ("brain", node.name):
            cluster.kill(name)
        node.run(["nft", "delete table inet vcproxy"])
        shutil.rmtree(tmp_path / node.name)  # as a node that is new
        began = time()
        cluster.start_brain()
        cluster.start_agent(node)
        world.connected()

        def served() -> bool:
            return world.kernel("one").forwarding.get("dir-acme") == before["one"]

        cluster.wait("the new node has it", served, 60)
        row = world.tenant_row("acme")
        assert row["restored"]
        assert row["synced"]
        assert row["staleSince"] < began
        assert world.tenant_row("acme", "one")["staleSince"] == pytest.approx(row["staleSince"])
        assert {name: world.kernel(name).forwarding["dir-acme"] for name in world.nodes} == before
        assert scene.answers() == {"acme/web-3"}
        acme.thaw()
        cluster.wait("its API server was read", lambda: not world.tenant_row("acme")["stale"], 90)
        assert not world.tenant_row("acme")["restored"]
        scene.endpoints("web-1")
        world.converged()
        assert scene.answers() == {"acme/web-1"}
