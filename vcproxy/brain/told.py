"""What a stream remembers of one tenant: what its node holds, and what it was told."""

from collections.abc import Callable

from vcproxy.brain.admission import Ticket
from vcproxy.brain.encoding import Snapshot
from vcproxy.brain.progress import Progress
from vcproxy.brain.store import Stored
from vcproxy.model.mark import UNMARKED, Mark
from vcproxy.model.tenant import EMPTY_DIGEST, Tenant


class Told:
    """One tenant on one stream.

    `floor`: how new that was what it came with; nothing once it has newer content from this stream. `unheard`: kinds of
    which that cannot be known. `of`: whose content it was told, which is another one when the brain has left the tenant
    meanwhile. `asked`: the node has yet to answer.
    """

    def __init__(
        self,
        digest: bytes | None,
        clock: Callable[[], float],
        floor: Mark = UNMARKED,
        unheard: frozenset[str] = frozenset(),
        of: Stored | None = None,
    ) -> None:
        self.floor = floor
        self.unheard = unheard
        self.of = of
        self.asked = of is not None
        self.shown: Mark = UNMARKED  # with the facts
        self.behind = ""
        self.facts: Tenant | None = None
        self.digest = EMPTY_DIGEST if digest is None else digest
        self.refresh = False  # what the node holds is wrong, whatever its digest
        self.synced = False
        # A node that comes back may think a tenant stale that is well again: None is "not told yet".
        self.stale: tuple[float | None, str] | None = None if digest is not None else (None, "")
        self.paused = False
        self.snapshot: Snapshot | None = None
        self.part = 0
        self.ticket: Ticket | None = None
        self.progress = Progress(clock)

    def settled(self, stored: Stored) -> bool:
        """It was told all that there is of the tenant now. Ask only after a message about it."""
        return (
            self.digest == stored.model.digest
            and self.snapshot is None
            and self.synced
            and self.stale == (stored.stale_since, stored.stale_reason)
            and not self.behind
        )

    def forget_snapshot(self) -> None:
        """The one that is being sent is of no use any more."""
        self.snapshot, self.part = None, 0
        if self.ticket is not None:
            self.ticket.release()
            self.ticket = None
