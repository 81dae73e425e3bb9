"""How new it is what a brain knows of the super cluster: where pods run, what nodes are, which tenants there are.

What nodes are told of that (their facts, their pods, which tenants are theirs) depends on all of it, so there is one
mark for it, with a position for each collection that is followed (see vcproxy.model.mark). Chronicle says what becomes
of it when a node is ahead: what lags is listed again, which is the truth.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from vcproxy.brain.chronicle import Chronicle
from vcproxy.brain.inputs import ApiInput
from vcproxy.brain.overtaking import Overtaking
from vcproxy.kube.reflector import Deleted, Event, Listed, Malformed, Upserted
from vcproxy.model.mark import Mark, parse_version
from vcproxy.model.tenant import SUPER_UID
from vcproxy.ops import logs, metrics

LISTS_APART_SECONDS = 30.0
"""Between lists that are asked for because nodes are ahead: these may be large."""
MOST_PLACES = 12
"""Collections that a mark speaks of: with a tenant's own kinds a node takes 16. The first are followed always."""

_CREDENTIALS = "/secrets"
"""They say how to reach a tenant, nothing that a node is told; and there may be a watch for each."""

_log = logs.get("supercluster")


class SuperAge:
    """The mark. `inputs`: all that follow the super cluster now; `announce`: have nodes' streams look again.

    `await run()` within a TaskGroup.
    """

    def __init__(self, inputs: Callable[[], Iterable[ApiInput]]) -> None:
        self.announce: Callable[[], None] = lambda: None
        self._inputs = inputs
        self._places: dict[str, None] = {}
        self._chronicle = Chronicle(kinds=self._places)
        self._overtaking = Overtaking(
            chronicle=self._chronicle,
            mark=self.mark,
            announce=lambda: self.announce(),
            relist=self._relist,
            apart=LISTS_APART_SECONDS,
        )

    def told(self, path: str, event: Event[Any], version: str) -> None:
        """An event of a collection was taken in; `version`: up to where that one is known now."""
        listed = isinstance(event, Listed)
        if path.endswith(_CREDENTIALS) or not (listed or isinstance(event, Upserted | Deleted | Malformed)):
            return
        held, number = self._chronicle.mark.get(path), parse_version(version)
        if held is not None and number is not None and number < held.seen and not self._chronicle.asked:
            return  # of two that follow one collection, the one that was slower
        if path not in self._places:
            if len(self._places) == MOST_PLACES:
                return
            self._places[path] = None
        self._chronicle.taken({path: version}, touched=(path,), listed=(path,) if listed else ())
        self._chronicle.settled()
        if listed:
            self._overtaking.reached(self.mark())

    def mark(self) -> Mark:
        """Where this brain is."""
        return self._chronicle.at(self._read_to())

    def overtaken(self, by: Mark) -> None:
        """A node was told something newer in these places."""
        self._overtaking.told(by)

    async def run(self) -> NoReturn:
        """Find out what is true when a node is ahead."""
        await self._overtaking.run()

    def _relist(self) -> None:
        self._chronicle.listing()
        metrics.RELISTED.labels(SUPER_UID).inc()
        _log.warning("a node is ahead of this brain in what it knows of the super cluster: all is listed again")
        for found in list(self._inputs()):
            found.relist()

    def _read_to(self) -> Mapping[str, str]:
        return {path: version for found in self._inputs() for path, version in found.places.items()}
