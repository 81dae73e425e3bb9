"""How new it is what the store holds of one tenant: of its own objects (see chronicle), and of what they are judged by.

The mark follows the content, never the other way round: while something that was read waits to be compiled, it stays
at what was compiled before.
"""

from collections.abc import Callable, Collection, Mapping
from typing import NoReturn, Protocol

from vcproxy.brain.chronicle import KINDS, Chronicle
from vcproxy.brain.overtaking import Overtaking
from vcproxy.brain.sources import Input
from vcproxy.brain.store import Follower
from vcproxy.model.mark import UNMARKED, Mark

LISTS_APART_SECONDS = 10.0
"""Between lists that are asked for because nodes are ahead."""


class Work(Protocol):
    """What a feed has yet to do."""

    @property
    def loading(self) -> bool:
        """Content is a former run's, or nothing."""

    @property
    def waiting(self) -> bool:
        """Something that was read is not compiled."""

    @property
    def judging(self) -> bool:
        """Something is to be compiled, or judged anew."""


class FeedAge:
    """The mark of one feed; `await run()` within a TaskGroup.

    `held`: the mark of what the store holds so far. `ground`: how new all of that is what content is compiled by,
    besides the tenant's own objects; None: there is no such thing. `announce`: have the streams of nodes look again;
    `relist`: begin to list everything.
    """

    def __init__(
        self,
        source: Input,
        work: Work,
        *,
        held: Mark,
        ground: Follower | None,
        announce: Callable[[], None],
        relist: Callable[[], None],
    ) -> None:
        self._source, self._work, self._ground = source, work, ground
        self._chronicle = Chronicle({kind: at for kind, at in held.items() if kind in KINDS})
        self._overtaking = Overtaking(
            chronicle=self._chronicle, mark=self.mark, announce=announce, relist=relist, apart=LISTS_APART_SECONDS
        )
        self._versions: Mapping[str, str] = {}  # of lists before the ones under way
        self._grounded: Mark = UNMARKED

    async def run(self) -> NoReturn:
        """Find out what is true when a node is ahead."""
        await self._overtaking.run()

    def mark(self) -> Mark:
        """How new what the store holds is."""
        own = self._chronicle
        self._stand()
        still = self._work.waiting or self._work.loading
        return {**self._grounded, **(own.mark if still else own.at(self._read_to()))}

    def overtaken(self, by: Mark) -> None:
        """A node holds content that may be newer in these kinds."""
        if self._ground is not None and (beneath := {kind: at for kind, at in by.items() if kind not in KINDS}):
            self._ground.overtaken(beneath)
        if own := {kind: at for kind, at in by.items() if kind in KINDS}:
            self._overtaking.told(own)

    def listing(self) -> None:
        """All is listed from now on, what was read and not compiled as well."""
        self._chronicle.abandoned()
        self._chronicle.listing()

    def ended(self) -> None:
        """The lists and watches so far end here; others follow."""
        self._versions = self._read_to()

    def taken(self, *, touched: Collection[str], listed: Collection[str]) -> None:
        """All that was read until now is about to be compiled (see Chronicle.taken)."""
        self._chronicle.taken(self._read_to(), touched=touched, listed=listed)

    def telling(self) -> None:
        """The last of what was taken is about to be told: if history was rewritten, that is of the new one."""
        if self._chronicle.rewritten:
            self._chronicle.settled()

    def settle(self) -> None:
        """All that was taken is in the store."""
        self._chronicle.settled()
        self._stand()
        self._overtaking.reached(self._chronicle.mark)

    def _stand(self) -> None:
        """Unless something of the ground waits to be compiled, content is as new as that. Of a former run's content
        nobody knows: it lacks what was taken away since, and perhaps what was granted.
        """
        if self._ground is None or self._work.loading:
            self._grounded = UNMARKED
        elif not self._work.judging:
            self._grounded = self._ground.mark()

    def _read_to(self) -> Mapping[str, str]:
        return {**self._versions, **self._source.versions}
