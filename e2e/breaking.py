"""A world in which everything can be broken, and put in order again whatever was done to it.

The brain is on a machine of its own: nodes reach it over the fabric, where packets can be lost or answered with resets,
and it reaches each API server through a relay that can be cut or frozen. Brain and agents have clocks that can be moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from e2e.clock import Clock
from e2e.controlplane import ControlPlane
from e2e.oracle import SUPER
from e2e.world import World, running
from vcproxy.lab import netns

SILENCE = 3.0
"""Seconds after which a tenant's watch that says nothing is given up."""
PORT = 7443
"""Where the brain listens."""
TABLE = "inet partition"


class Ground:
    """See the module. `node`: the one to which things happen, by its name in the world."""

    node = "one"

    def __init__(self, world: World, clocks: Mapping[str, Clock]) -> None:
        self.world = world
        self.cluster = world.cluster
        self._clocks = clocks

    @property
    def _address(self) -> str:
        return self.world.nodes[self.node].ip4

    @property
    def agent(self) -> str:
        """The name of that node's agent."""
        return self.world.nodes[self.node].name

    def set_clocks(self, *, brain: float, agents: float) -> None:
        """Make the clocks of brain and agents so many hours later than the machine's."""
        self._clocks["brain"].set(brain * 3600)
        self._clocks["agent"].set(agents * 3600)

    def part(self) -> None:
        """From now on all packets between the brain and the node are lost."""
        self._nft(_chain("input", f"ip saddr {self._address} tcp dport {PORT} drop"))
        self._nft(_chain("output", f"ip daddr {self._address} tcp sport {PORT} drop"))

    def reset(self) -> None:
        """The stream of the node is reset, and so is every further connection."""
        self._nft(_chain("input", f"ip saddr {self._address} tcp dport {PORT} reject with tcp reset"))
        netns.run(self.world.brain_ns, ["ss", "-K", "dst", self._address, "sport", "=", f":{PORT}"])

    def join(self) -> None:
        """Packets pass."""
        self._nft(f"table {TABLE}\ndelete table {TABLE}\n")

    def mend(self, *, anew: bool) -> None:
        """Whatever was broken: everything runs, all can reach each other, clocks are right, and kernels agree.

        `anew`: the brain is a new one, since one that saw an API server fail again and again waits ever longer for it.
        """
        world = self.world
        for plane in (world.planes[SUPER], world.planes["acme"]):
            plane.thaw()
            plane.start()
        for relay in world.relays.values():
            relay.thaw()
            relay.mend()
        self.set_clocks(brain=0.0, agents=0.0)
        self.join()
        running = [name for name in ("brain", *(n.name for n in world.nodes.values())) if self.cluster.running(name)]
        for name in running:
            self.cluster.thaw(name)
        if anew and "brain" in running:
            self.cluster.kill("brain")
        world.revive(within=60)

    def _nft(self, ruleset: str) -> None:
        netns.run(self.world.brain_ns, ["nft", "-f", "-"], stdin=ruleset)


def _chain(hook: str, rule: str) -> str:
    return f"table {TABLE} {{ chain {hook} {{ type filter hook {hook} priority -300; {rule}; }}; }}"


@contextmanager
def breakable(directory: Path, super_plane: ControlPlane, acme: ControlPlane, globex: ControlPlane) -> Iterator[Ground]:
    """Tenants with API servers of their own (super and acme are the ones that break), and `initech` from manifests."""
    clocks = {name: Clock(directory / f"{name}.clock") for name in ("brain", "agent")}

    def environment(name: str) -> Mapping[str, str]:
        return clocks["brain" if name == "brain" else "agent"].environment

    with running(
        directory,
        super_plane,
        flat={"acme": acme, "globex": globex, "initech": None},
        tenants={"silenceSeconds": SILENCE},
        apart=True,
        environment=environment,
    ) as world:
        yield Ground(world, clocks)
