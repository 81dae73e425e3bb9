"""Faults while Services change: what lives is always answered, and after healing kernels are as the API servers say.

Four tenants change without pause (e2e.changing). Clients on both nodes dial, in each of them, a Service whose endpoint
stays and one that has an endpoint that stays and others that come and go: not one connection may fail, whatever is
killed, frozen, cut off, or told another time. Those whom a fault does not concern go on, and their changes arrive while
it lasts. Each fault is seen to bite.

VCPROXY_FAULTS_SEED repeats a run, or makes another one.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from e2e.apiclient import ApiClient, ApiError
from e2e.breaking import Ground, breakable
from e2e.changing import ROLES, SERVICES, ApiHand, Changer, FolderHand, Script
from e2e.controlplane import ControlPlane, start_together
from e2e.objects import namespace
from e2e.oracle import SUPER
from e2e.polling import eventually
from e2e.world import PORT, fresh_vips
from vcproxy.lab.load import Load, Result, Span, Target

pytestmark = [pytest.mark.controlplane, pytest.mark.packets]

SEED = os.environ.get("VCPROXY_FAULTS_SEED", "20261128")
OWN = (SUPER, "acme", "globex")
TENANTS = (*OWN, "initech")
OTHERS = (SUPER, "globex", "initech")
"""Than acme."""
NODES = ("one", "two")
CHANGES = 20
"""That every tenant which can change makes before, during and after a fault."""
HOURS = 5.0
NAMESPACE = "faults"

Act = Callable[[Ground], object]
Sees = Callable[[Ground], bool]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What `breaks` and what `heals`, and that it `bites`.

    `parts`: what it is done to; faults with the same part exclude each other. `changing`: tenants whose API server can
    be written to meanwhile. `lags`: on which nodes the changes of which tenants do not arrive meanwhile; all others do.
    """

    breaks: Act
    heals: Act
    parts: frozenset[str]
    bites: Sees = lambda ground: True
    changing: tuple[str, ...] = TENANTS
    lags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def of_plane(name: str, breaks: Callable[[ControlPlane], object], bites: Sees) -> Fault:
    """Something of the control plane of `name` is not there."""
    changing = tuple(tenant for tenant in TENANTS if tenant != name)

    def heal(ground: Ground) -> None:
        ground.world.planes[name].thaw()
        ground.world.planes[name].start()

    return Fault(
        breaks=lambda ground: breaks(ground.world.planes[name]),
        heals=heal,
        parts=frozenset({name}),
        bites=bites,
        changing=changing,
    )


def stale(ground: Ground) -> bool:
    """acme is shown as stale by the brain and by both nodes."""
    return all(ground.world.tenant_row("acme", where)["staleSince"] for where in ("brain", *NODES))


def unwritable(name: str) -> Sees:
    """Nothing can be written to an API server."""

    def look(ground: Ground) -> bool:
        client = ApiClient(ground.world.planes[name].kubeconfig, timeout=1.0)
        try:
            client.patch("Namespace", "default", {"metadata": {"annotations": {"look": str(time.time())}}})
        except (OSError, ApiError):
            return True
        finally:
            client.close()
        return False

    return look


def alone(ground: Ground) -> bool:
    """The node's agent has no brain."""
    return not ground.cluster.ask(ground.agent)["brain"]


def ended(name: str) -> Act:
    """SIGTERM to the brain or to the node's agent: it ends in good order."""

    def act(ground: Ground) -> None:
        assert ground.cluster.end(name or ground.agent) == 0

    return act


def clocks(*, brain: float, agents: float) -> Fault:
    """The wall clocks of these jump by hours while they run, and at the end back again."""

    def bites(ground: Ground) -> bool:
        """A tenant's last change is dated by them."""
        dated = (("brain", "updatedAt", brain), *((place, "committedAt", agents) for place in NODES))
        return all(
            abs(ground.world.tenant_row("globex", where)[key] - time.time() - hours * 3600) < 600
            for where, key, hours in dated
        )

    return Fault(
        breaks=lambda ground: ground.set_clocks(brain=brain, agents=agents),
        heals=lambda ground: ground.set_clocks(brain=0.0, agents=0.0),
        parts=frozenset({"clocks"}),
        bites=bites,
    )


def start_brain(ground: Ground) -> None:
    ground.cluster.start_brain()


def start_agent(ground: Ground) -> None:
    ground.cluster.start_agent(ground.world.nodes[ground.node])


def freeze_both(ground: Ground) -> None:
    ground.cluster.freeze("brain")
    ground.world.planes["acme"].freeze()


def thaw_both(ground: Ground) -> None:
    ground.world.planes["acme"].thaw()
    ground.cluster.thaw("brain")


EVERYWHERE = dict.fromkeys(TENANTS, NODES)
ON_ONE = dict.fromkeys(TENANTS, ("one",))
BRAIN, AGENT, STREAM, RELAY = (frozenset({part}) for part in ("brain", "agent", "stream", "relay"))

FAULTS: Mapping[str, Fault] = {
    "API server killed": of_plane("acme", lambda plane: plane.kill(), stale),
    "API server frozen": of_plane("acme", lambda plane: plane.freeze(), stale),
    "etcd killed": of_plane("acme", lambda plane: plane.kill("etcd"), unwritable("acme")),
    "etcd frozen": of_plane("acme", lambda plane: plane.freeze("etcd"), unwritable("acme")),
    "super API server killed": of_plane(SUPER, lambda plane: plane.kill(), unwritable(SUPER)),
    "super API server frozen": of_plane(SUPER, lambda plane: plane.freeze(), unwritable(SUPER)),
    "API server cut off": Fault(
        breaks=lambda g: g.world.relays["acme"].cut(),
        heals=lambda g: g.world.relays["acme"].mend(),
        parts=RELAY,
        bites=stale,
        lags={"acme": NODES},
    ),
    "API server out of reach": Fault(
        breaks=lambda g: g.world.relays["acme"].freeze(),
        heals=lambda g: g.world.relays["acme"].thaw(),
        parts=RELAY,
        bites=stale,
        lags={"acme": NODES},
    ),
    "brain killed": Fault(
        breaks=lambda g: g.cluster.kill("brain"), heals=start_brain, parts=BRAIN, bites=alone, lags=EVERYWHERE
    ),
    "brain ended": Fault(breaks=ended("brain"), heals=start_brain, parts=BRAIN, bites=alone, lags=EVERYWHERE),
    "brain frozen": Fault(
        breaks=lambda g: g.cluster.freeze("brain"),
        heals=lambda g: g.cluster.thaw("brain"),
        parts=BRAIN,
        lags=EVERYWHERE,
    ),
    "brain and API server frozen": Fault(
        breaks=freeze_both,
        heals=thaw_both,
        parts=BRAIN | {"acme"},
        bites=unwritable("acme"),
        changing=OTHERS,
        lags=EVERYWHERE,
    ),
    "agent killed": Fault(breaks=lambda g: g.cluster.kill(g.agent), heals=start_agent, parts=AGENT, lags=ON_ONE),
    "agent ended": Fault(breaks=ended(""), heals=start_agent, parts=AGENT, lags=ON_ONE),
    "agent frozen": Fault(
        breaks=lambda g: g.cluster.freeze(g.agent),
        heals=lambda g: g.cluster.thaw(g.agent),
        parts=AGENT,
        lags=ON_ONE,
    ),
    "stream reset": Fault(
        breaks=Ground.reset,
        heals=Ground.join,
        parts=STREAM,
        bites=alone,
        lags=ON_ONE,
    ),
    "stream loses all packets": Fault(breaks=Ground.part, heals=Ground.join, parts=STREAM, lags=ON_ONE),
    "stream loses all packets until it is given up": Fault(
        breaks=Ground.part, heals=Ground.join, parts=STREAM, bites=alone, lags=ON_ONE
    ),
    "brain's clock put forward, agents' back": clocks(brain=HOURS, agents=-HOURS),
    "brain's clock put back, agents' forward": clocks(brain=-HOURS, agents=HOURS),
}


class Churn:
    """All tenants changing, and the clients that must not notice. `broken`: times within which clients of a node may
    see failures, by node. `anew`: the next test needs a new brain.
    """

    def __init__(self, ground: Ground, changers: Mapping[str, Changer], targets: Sequence[Target]) -> None:
        self.ground = ground
        self.broken: dict[str, Span] = {}
        self.anew = False
        self.results: dict[tuple[str, str], Result] = {}
        self._changers = changers
        self._targets = targets

    @contextmanager
    def under_load(self) -> Iterator[None]:
        """Changes and load while the context is open; then clients are asked."""
        self.broken.clear()
        loads: dict[tuple[str, str], Load] = {}
        with ExitStack() as stack:
            for tenant in TENANTS:
                for place in NODES:
                    client = self.ground.world.pods[tenant, f"client-{place}"]
                    loads[tenant, place] = stack.enter_context(Load(client, self._targets, pause=0.01, seconds=600))
            for changer in self._changers.values():
                stack.enter_context(changer)
            yield
        self.results = {key: load.result for key, load in loads.items()}
        for (tenant, place), result in self.results.items():
            began, ended = self.broken.get(place, (0.0, 0.0))
            strange = [span for span in result.failed if span[1] < began or span[0] > ended]
            assert not strange, (tenant, place, result.failures, result.first_failures)
            assert set(result.answers) <= {f"{tenant}/{role}" for role in ROLES}
            assert result.answers[f"{tenant}/web-1"] > 50, "too few to prove anything"

    def more(self, *tenants: str, changes: int = CHANGES) -> None:
        """Wait until these tenants have changed so often once more."""
        chosen = {name: self._changers[name] for name in tenants}
        goals = {name: changer.changes + changes for name, changer in chosen.items()}

        def reached() -> bool:
            for name, changer in chosen.items():
                changer.check()
                assert changer.changes >= goals[name], (
                    f"{name} lacks {goals[name] - changer.changes}: {changer.failures}"
                )
            return True

        eventually(reached, within=40, what="churn")

    @contextmanager
    def quiet(self, *tenants: str) -> Iterator[None]:
        """These tenants do not change, and have just changed so that it shows."""
        with ExitStack() as stack:
            for name in tenants:
                stack.enter_context(self._changers[name].quiet())
            for name in tenants:
                self._changers[name].mark()
            yield

    def settle(self, *, within: float = 60.0) -> None:
        """Wait until every kernel has what every tenant's objects say."""
        with self.quiet(*TENANTS):
            self.ground.world.converged(within=within)


@pytest.fixture(scope="module")
def ground(
    tenant_planes: tuple[ControlPlane, ControlPlane],
    control_plane_binaries: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Ground]:
    """A world with a super cluster and a tenant of its own, which things are done to."""
    with ExitStack() as stack:
        planes = [
            ControlPlane(name, tmp_path_factory.mktemp(f"fault-{name}"), bin_dir=control_plane_binaries)
            for name in ("super", "acme")
        ]
        for plane in planes:
            stack.callback(plane.close)
        start_together(planes)
        yield stack.enter_context(breakable(tmp_path_factory.mktemp("faults"), *planes, tenant_planes[1]))


@pytest.fixture(scope="module")
def scripts(ground: Ground) -> Iterator[Churn]:
    """What changes in all tenants, with the same names and ClusterIPs, and what is dialled."""
    world = ground.world
    anchor, partly, marker = fresh_vips(), fresh_vips(), fresh_vips()
    vips = [fresh_vips() for _ in range(SERVICES)]
    changers = {}
    with ExitStack() as stack:
        for name in TENANTS:
            pods = {role: world.pods[name, role] for role in ROLES}
            script = Script(NAMESPACE, pods, vips, anchor, partly, marker, random.Random(f"{SEED} {name}"))
            if name in OWN:
                client = world.planes[name].client
                client.create(namespace(NAMESPACE))
                for kind in ("EndpointSlice", "Service"):
                    stack.callback(client.delete_all, kind, NAMESPACE)
            hand = ApiHand(ApiClient(world.planes[name].kubeconfig, timeout=1.0)) if name in OWN else None
            changers[name] = Changer(script, hand or FolderHand(world, name))
            stack.callback(changers[name].close)
            changers[name].begin()
        targets: list[Target] = [(protocol, vip, PORT) for vip in anchor for protocol in ("tcp", "udp")]
        # A datagram may be lost with the endpoint that it was sent to.
        targets += [("tcp", vip, PORT) for vip in partly]
        yield Churn(ground, changers, targets)


@pytest.fixture
def churn(scripts: Churn) -> Iterator[Churn]:
    """All is well when a test begins; whatever it did, and however it ended, the next one finds all in order."""
    scripts.ground.world.converged()
    scripts.anew = False
    yield scripts
    scripts.ground.mend(anew=scripts.anew)


@pytest.mark.parametrize("name", FAULTS)
def test_what_lives_is_answered_and_kernels_heal(churn: Churn, name: str) -> None:
    ground, world, fault = churn.ground, churn.ground.world, FAULTS[name]
    churn.anew = bool(fault.parts & {SUPER, "acme", "relay"})
    with churn.under_load():
        churn.more(*TENANTS)
        fault.breaks(ground)
        churn.more(*fault.changing)
        eventually(lambda: fault.bites(ground), within=40, what=f"{name} is noticed")
        with churn.quiet(*fault.changing):
            for place in NODES:
                lagging = [tenant for tenant in fault.changing if place in fault.lags.get(tenant, ())]
                if current := [tenant for tenant in fault.changing if tenant not in lagging]:
                    world.converged(*current, places=[place])
                for tenant in lagging:
                    assert world.disagreements([tenant], [place]), f"{tenant} is followed on {place}"
        fault.heals(ground)
        churn.more(*TENANTS)
        churn.settle()


def test_nothing_fails_but_what_an_absent_table_must_fail(churn: Churn) -> None:
    """Without its table a node translates nothing: connections under way then may fail, no others, on no other node."""
    ground, world = churn.ground, churn.ground.world
    node = world.nodes[ground.node]
    with churn.under_load():
        churn.more(*TENANTS)
        began = time.monotonic()
        node.run(["nft", "delete table inet vcproxy"])
        with churn.quiet(*TENANTS):
            world.converged(within=10)
            churn.broken[ground.node] = (began, time.monotonic())
        churn.more(*TENANTS)
        churn.settle()
    failed = [span for (_, place), result in churn.results.items() if place == ground.node for span in result.failed]
    print(f"{len(failed)} requests failed, the last {max(at for at, _ in failed) - began:.3f} s after the deletion")
    assert failed, "the table was not missed"


@pytest.mark.timeout(240)
def test_faults_at_any_moment(churn: Churn) -> None:
    """Faults drawn by lot begin and end at any moment of the churn, several at a time."""
    ground, chance = churn.ground, random.Random(f"{SEED} any")
    churn.anew = True
    active: dict[str, Fault] = {}
    story = []
    with churn.under_load():
        for _ in range(16):
            churn.more("initech", changes=chance.randrange(30))
            taken = {part for fault in active.values() for part in fault.parts}
            free = [name for name, fault in FAULTS.items() if not fault.parts & taken]
            if active and (not free or chance.random() < 0.45):
                name = chance.choice(list(active))
                active.pop(name).heals(ground)
                story.append(f"healed: {name}")
            else:
                name = chance.choice(free)
                FAULTS[name].breaks(ground)
                active[name] = FAULTS[name]
                story.append(name)
        print("\n".join(story))  # pytest shows it when the test fails
        for fault in active.values():
            fault.heals(ground)
        churn.more(*TENANTS)
        churn.settle()
