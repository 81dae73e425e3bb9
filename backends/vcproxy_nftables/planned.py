"""What one call of the planner means for the kernel: elements, chains, flows. `plan` fills it, `kernel` does it."""

from collections.abc import Iterator, Mapping, Set

from vcproxy_nftables.changes import Changes
from vcproxy_nftables.flowcolumns import Target
from vcproxy_nftables.pools import split
from vcproxy_nftables.state import WIDTH


class Flows(Mapping[Target, Set[Target]]):
    """UDP destinations whose flows must be looked at, with the targets that they may stay with."""

    def __init__(self) -> None:
        self._serving: dict[Target, bytes] = {}

    def note(self, destination: Target, serving: bytes) -> None:
        """The last word about a destination counts."""
        self._serving[destination] = serving

    def of(self, family: int) -> "Flows":
        """Those of IP family 4 or 6."""
        chosen = Flows()
        width = WIDTH[family] - 2
        chosen._serving = {target: serving for target, serving in self._serving.items() if len(target[0]) == width}
        return chosen

    def __getitem__(self, destination: Target) -> Set[Target]:
        width = len(destination[0]) + 2
        packed = split(self._serving[destination], width)
        return {(target[:-2], int.from_bytes(target[-2:], "big")) for target in packed}

    def __contains__(self, destination: object) -> bool:
        return destination in self._serving

    def __iter__(self) -> Iterator[Target]:
        return iter(self._serving)

    def __len__(self) -> int:
        return len(self._serving)


class Plan:
    """What one call means for the kernel.

    `flows`: by zone; PUBLIC stands for all zones that may dial public frontends. `classes`, `timeouts`: by family, the
    size classes and affinity timeouts whose chains must exist before; `zoning`: whether those that tell zones must.
    `freed`: (family, pool number), to be handed out again when all is committed.
    """

    PUBLIC = -1

    def __init__(self) -> None:
        self.changes = Changes()
        self.flows: dict[int, Flows] = {}
        self.classes: dict[int, set[int]] = {4: set(), 6: set()}
        self.timeouts: dict[int, set[int]] = {4: set(), 6: set()}
        self.zoning = False
        self.freed: list[tuple[int, int]] = []
