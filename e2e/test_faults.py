"""Faults while Services change: what lives is always answered, and after healing kernels are as the API servers say.

In both tenants a seeded churner creates and deletes Services and rewrites their endpoints without pause. A Service with
an endpoint that stays is dialled all the while: not one connection may fail, whatever is killed or frozen.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import pytest

from e2e.apiclient import ApiClient, ApiError
from e2e.conftest import NamespaceFactory
from e2e.polling import eventually
from e2e.world import PORT, World, fresh_vips, slices, web
from vcproxy.lab.load import Load, Target

pytestmark = [pytest.mark.controlplane, pytest.mark.packets]

TENANTS = ("acme", "globex")
ROLES = ("web-1", "web-2", "web-3")
SEED = 20261128
CHANGES = 30
"""That every tenant whose API server answers sees while a fault lasts."""
Act = Callable[[World], object]


class Churner:
    """Changes one tenant from a thread of its own while the context is open. `changes`: how many were accepted."""

    def __init__(self, world: World, tenant: str, namespace: str, vips: list[tuple[str, str]]) -> None:
        self.changes = 0
        self._world, self._tenant, self._namespace, self._vips = world, tenant, namespace, vips
        self._client = ApiClient(world.planes[tenant].kubeconfig, timeout=1.0)
        self._rng = random.Random(f"{SEED} {tenant}")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Churner:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._client.close()

    def _run(self) -> None:
        while not self._over.wait(0.02):
            try:
                self._change()
            except (OSError, ApiError):
                continue  # its API server is away, or an answer was lost and the object is there already
            self.changes += 1

    def _change(self) -> None:
        number = self._rng.randrange(len(self._vips))
        name, chosen = f"roaming-{number}", self._rng.sample(ROLES, self._rng.randint(1, 3))
        pods = self._world.some(self._tenant, *chosen)
        held = {item["metadata"]["name"] for item in self._client.list("Service", self._namespace).items}
        if name not in held:
            self._client.create(web(name, self._vips[number], pods, namespace=self._namespace)[0])
        elif self._rng.random() < 0.2:
            self._client.delete("Service", name, self._namespace)
        else:
            for item in slices(name, pods, namespace=self._namespace):
                self._client.update(item)


def restart_brain(world: World) -> None:
    world.cluster.start_brain()
    world.connected()


def agent(world: World) -> str:
    return world.nodes["one"].name


def both_freeze(world: World) -> None:
    world.cluster.freeze("brain")
    world.planes["acme"].freeze()


def both_thaw(world: World) -> None:
    world.planes["acme"].thaw()
    world.cluster.thaw("brain")


FAULTS: Mapping[str, tuple[Act, Act, tuple[str, ...]]] = {
    "API server killed": (lambda w: w.planes["acme"].kill(), lambda w: w.planes["acme"].start(), ("globex",)),
    "API server frozen": (lambda w: w.planes["acme"].freeze(), lambda w: w.planes["acme"].thaw(), ("globex",)),
    "brain killed": (lambda w: w.cluster.kill("brain"), restart_brain, TENANTS),
    "brain frozen": (lambda w: w.cluster.freeze("brain"), lambda w: w.cluster.thaw("brain"), TENANTS),
    "agent killed": (lambda w: w.cluster.kill(agent(w)), lambda w: w.cluster.start_agent(w.nodes["one"]), TENANTS),
    "agent frozen": (lambda w: w.cluster.freeze(agent(w)), lambda w: w.cluster.thaw(agent(w)), TENANTS),
    "brain and API server frozen": (both_freeze, both_thaw, ("globex",)),
}
"""What breaks, what heals it, and which tenants go on changing meanwhile."""


@contextmanager
def churning(world: World, namespace: str) -> Iterator[dict[str, Churner]]:
    """Churn in both tenants, and clients of both nodes that see that no connection to an anchor fails."""
    anchor, vips = fresh_vips(), [fresh_vips() for _ in range(6)]
    for tenant in TENANTS:
        client = world.planes[tenant].client
        client.create_all(web("anchor", anchor, world.some(tenant, "web-1"), namespace=namespace))
        for number, pair in enumerate(vips):
            client.create_all(web(f"roaming-{number}", pair, world.some(tenant, "web-2"), namespace=namespace))
    world.converged()
    targets: list[Target] = [("tcp", vip, PORT) for vip in anchor]
    with ExitStack() as stack:
        loads = {
            (tenant, place): stack.enter_context(Load(world.pods[tenant, place], targets))
            for tenant in TENANTS
            for place in ("client-one", "client-two")
        }
        yield {name: stack.enter_context(Churner(world, name, namespace, vips)) for name in TENANTS}
    for (tenant, place), load in loads.items():
        assert load.result.failures == {}, (tenant, place, load.result.first_failures)
        assert set(load.result.answers) == {f"{tenant}/web-1"}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_lives_is_answered_and_kernels_heal(
    flat_world: World, fresh_namespace: NamespaceFactory, fault: str
) -> None:
    world = flat_world
    breaks, heals, changing = FAULTS[fault]
    namespace = fresh_namespace(*(world.planes[name].client for name in TENANTS))
    with churning(world, namespace) as churners:

        def more(*tenants: str) -> None:
            goals = {name: churners[name].changes + CHANGES for name in tenants}
            eventually(lambda: all(churners[n].changes >= goal for n, goal in goals.items()), within=20, what="churn")

        more(*TENANTS)
        breaks(world)
        try:
            more(*changing)
        finally:
            heals(world)
        more(*TENANTS)
    world.converged(within=60)
