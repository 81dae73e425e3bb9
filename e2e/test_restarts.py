"""Brain and node agents are killed and come back: packets flow all the while, and what was right is not written again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from e2e.conftest import NamespaceFactory
from e2e.oracle import SUPER, Kernel
from e2e.polling import eventually
from e2e.scene import Scene
from e2e.traffic import REQUESTS, Traffic
from e2e.watching import Watcher
from e2e.world import PORT, World
from vcproxy.lab import Refused, TcpSession

pytestmark = [pytest.mark.controlplane, pytest.mark.packets]


@pytest.fixture
def scene(flat_world: World, fresh_namespace: NamespaceFactory) -> Iterator[Scene]:
    """A Service in acme; after the test brain and agents run and agree, whatever the test did."""
    yield Scene(flat_world, "acme", fresh_namespace)
    flat_world.revive()


@contextmanager
def undisturbed(scene: Scene) -> Iterator[None]:
    """Sees that no packet is lost while the context is open: new connections and datagrams of both families on both
    nodes, in two tenants, and connections and flows that were there before.
    """
    world = scene.world
    with ExitStack() as stack:
        traffic = [
            stack.enter_context(Traffic(world.pods[tenant, client], vip, PORT, protocol, source_port=port))
            for tenant, client, vip, protocol, port in (
                (scene.tenant, "client-one", scene.vips[0], "TCP", 0),
                (scene.tenant, "client-two", scene.vips[1], "UDP", 0),
                (scene.tenant, "client-one", scene.vips[0], "UDP", 42000),  # the same flow again and again
                (scene.other, "client-one", scene.vips[1], "TCP", 0),
            )
        ]
        session = stack.enter_context(TcpSession(world.pods[scene.tenant, "client-one"], scene.vips[1], PORT))
        answered = session.reply.pod
        yield
        for one in traffic:
            one.more()
        assert session.ask("still there?") == f"{answered} still there?"
    assert not any(one.losses for one in traffic), [str(one) for one in traffic]
    assert len(traffic[2].answers) == 1, f"an established flow moved: {traffic[2]}"


def served(scene: Scene) -> None:
    """Clients of both nodes get answers now."""
    for client in ("client-one", "client-two"):
        for request in REQUESTS.values():
            assert request(scene.world.pods[scene.tenant, client], scene.vips[0], PORT).pod  # type: ignore[union-attr]


class TestBrain:
    def test_killed_and_back_costs_nothing(self, scene: Scene) -> None:
        world = scene.world
        before = world.counters()
        with undisturbed(scene), ExitStack() as stack:
            watchers = [stack.enter_context(Watcher(node)) for node in world.nodes.values()]
            identity = world.cluster.ask("brain")["brain"]
            world.cluster.kill("brain")
            served(scene)
            world.cluster.start_brain()
            world.connected()
            world.cluster.wait("every node has all that the brain has", lambda: settled(world))
            assert world.cluster.ask("brain")["brain"] != identity
            assert [watcher.heard() for watcher in watchers] == [[], []]
            assert [watcher.others for watcher in watchers] == [[], []]
        assert world.counters() == before

    def test_changes_made_while_it_was_away_arrive_alone(self, scene: Scene) -> None:
        world = scene.world

        def change() -> None:
            world.cluster.kill("brain")
            scene.endpoints("web-1", "web-3")
            world.cluster.start_brain()

        scene.makes(change)
        assert scene.answers() == {"acme/web-1", "acme/web-3"}

    def test_agent_that_starts_without_it_forwards_what_it_had(self, scene: Scene) -> None:
        world = scene.world
        before = {name: world.kernel(name) for name in world.nodes}
        with undisturbed(scene), Watcher(world.nodes["one"]) as watcher:
            world.cluster.kill("brain")
            restart_agent(world, "one")
            assert world.kernel("one") == before["one"]
            assert watcher.heard() == []
            counters = world.counters()["one"]
            assert (counters["snapshots"], counters["operations"]) == (0, 0)

    def test_agent_that_starts_without_it_and_without_a_table_programs_what_it_had(self, scene: Scene) -> None:
        world, node = scene.world, scene.world.nodes["one"]
        before = world.kernel("one")
        on_disk(world, "one")
        world.cluster.kill("brain")
        world.cluster.kill(node.name)
        node.run(["nft", "delete table inet vcproxy"])
        restart_agent(world, "one", kill=False)
        assert forwarded(world.kernel("one")) == forwarded(before)
        assert world.kernel("one").faults == ()
        served(scene)
        world.revive()
        scene.makes(lambda: scene.endpoints("web-2"))
        assert scene.answers() == {"acme/web-2"}


class TestNodeAgent:
    @pytest.mark.parametrize("name", ["one", "two"])
    def test_killed_and_back_costs_nothing(self, scene: Scene, name: str) -> None:
        world = scene.world
        with undisturbed(scene), Watcher(world.nodes[name]) as watcher:
            restart_agent(world, name)
            world.connected()
            world.cluster.wait("the node has all that the brain has", lambda: settled(world))
            assert watcher.heard() == []
            assert watcher.others == []
            counters = world.counters()[name]
            assert (counters["snapshots"], counters["operations"]) == (0, 0)

    def test_changes_made_while_it_was_away_arrive_alone(self, scene: Scene) -> None:
        world, name = scene.world, scene.world.nodes["one"].name

        def change() -> None:
            world.cluster.kill(name)
            scene.endpoints("web-3")
            world.converged(places=["two"])
            world.cluster.start_agent(world.nodes["one"])

        scene.makes(change)
        assert scene.answers() == {"acme/web-3"}

    def test_table_deleted_under_it_is_made_again(self, scene: Scene) -> None:
        world = scene.world
        for name, node in world.nodes.items():
            before = world.kernel(name)
            node.run(["nft", "delete table inet vcproxy"])
            world.converged(within=5)
            assert forwarded(world.kernel(name)) == forwarded(before)
        served(scene)

    def test_elements_changed_by_others_are_mended(self, scene: Scene) -> None:
        world, node = scene.world, scene.world.nodes["one"]
        zone = world.kernel("one").zones["dir-acme"]
        served(scene)
        node.run(["nft", f"delete element inet vcproxy tcp4_frontends {{ {zone} . {scene.vips[0]} . {PORT} }}"])
        world.converged(within=5)
        assert not isinstance(REQUESTS["TCP"](world.pods["acme", "client-one"], scene.vips[0], PORT), Refused)
        served(scene)


def restart_agent(world: World, name: str, *, kill: bool = True) -> None:
    """SIGKILL a node's agent, start it, and wait until it has done what it can do by itself."""
    node = world.nodes[name]
    if kill:
        world.cluster.kill(node.name)
    world.cluster.start_agent(node)
    world.cluster.wait(f"the agent on {name} has started", lambda: world.cluster.ask(node.name)["started"])


def on_disk(world: World, name: str) -> None:
    """Wait until an agent has written what it committed last, which it does a second later (vcproxy.node.cache)."""
    node = world.nodes[name]

    def written() -> bool:
        rows = world.cluster.ask(node.name)["tenants"]
        files = {row["uid"]: world.cluster.directory / node.name / f"{row['uid']}.tenant" for row in rows}
        return all(
            files[row["uid"]].exists() and files[row["uid"]].stat().st_mtime > row["committedAt"] for row in rows
        )

    eventually(written, what=f"state of {name} on disk")


def settled(world: World) -> bool:
    """Whether every node has committed the newest of every tenant."""
    brain = {row["uid"]: row for row in world.cluster.ask("brain")["tenants"]}
    if len(brain) != len(world.tenants) or not all(row["synced"] for row in brain.values()):
        return False
    nodes = [world.cluster.ask(node.name)["tenants"] for node in world.nodes.values()]
    return all(
        {row["uid"]: row["committedDigest"] for row in rows} == {uid: row["digest"] for uid, row in brain.items()}
        for rows in nodes
    )


def forwarded(kernel: Kernel) -> object:
    """What a kernel does, whatever its zones and pools are called."""
    return kernel.forwarding, kernel.attached, sorted(kernel.zones), SUPER in kernel.zones
