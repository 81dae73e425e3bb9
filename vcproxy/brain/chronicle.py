"""Where a tenant's content stands in its API server's history, and what becomes of it when a node is ahead.

Replicas of the brain share no state: what they share is the API server, and the marks (vcproxy.model.mark) that nodes
carry from one to the other. A node that holds something newer than this brain has *overtaken* it. Then this brain lists
again. A list without resourceVersion is a consistent read, so one that was begun after the brain was told is the truth,
whatever it says:

- its version has reached the node's: this brain lagged, and no longer does;
- its version is lower: nobody can have seen that version in the history as it is now. It was rewritten, and what this
  brain has is newer. A new epoch says so to nodes and, by way of them, to all replicas.

So a replica that is cut off from the API server never speaks for it, and a node is never left with what no longer is:
whoever can list decides. An epoch is the time when the rewrite was noticed, not a count: of two replicas that noticed
different rewrites, the later is right. One whose epoch is lower than a node's has been overtaken too, lists, and takes
over the epoch.
"""

import time
from collections.abc import Callable, Collection, Mapping

import msgspec

from vcproxy.model.mark import LARGEST, UNMARKED, Mark, Position, lacking, parse_version

KINDS = ("Service", "EndpointSlice")
"""What a tenant's content is compiled from."""


class Chronicle:
    """One mark. Plain data; `wall` gives Unix seconds. A mark that was given out does not change. `kinds`: of which it
    speaks, others are not heeded.

    A batch of changes is `taken`, compiled step by step, and then `settled`: in between, content may have some of it.
    """

    def __init__(
        self, mark: Mark = UNMARKED, *, kinds: Collection[str] = KINDS, wall: Callable[[], float] = time.time
    ) -> None:
        self.mark = mark
        self._kinds = kinds
        self._wall = wall
        self._taken: dict[str, Position] = {}
        self._asked: dict[str, Position] = {}  # kinds in which a node is ahead, and its position
        self._answerable: dict[str, Position] = {}  # of these, what the next list answers

    def taken(self, versions: Mapping[str, str], *, touched: Collection[str], listed: Collection[str]) -> None:
        """What is compiled from now on reaches up to `versions`; it has changes of the kinds `touched`, and whole lists
        of the kinds `listed`. A list without a version that is a number leaves its kind without position.
        """
        for kind in self._kinds:
            if kind not in versions and kind not in listed:
                continue
            if (version := parse_version(versions.get(kind, ""))) is None:
                self.mark = {said: at for said, at in self.mark.items() if said != kind}
                self._taken.pop(kind, None)
                continue
            old = self._taken.get(kind) or self.mark.get(kind)
            epoch, changed = (old.epoch, old.changed) if old else (0, version)
            if kind in listed:
                epoch = self._judge(kind, version, old)
            if kind in listed or kind in touched:
                changed = version
            self._taken[kind] = Position(changed, version, epoch)
            if (held := self.mark.get(kind)) and held.epoch == epoch:
                self.mark = {**self.mark, kind: msgspec.structs.replace(held, changed=max(held.changed, changed))}

    @property
    def rewritten(self) -> bool:
        """What is taken is of another history than what is settled."""
        settled = self.mark
        return any(kind in settled and settled[kind].epoch != at.epoch for kind, at in self._taken.items())

    def settled(self) -> None:
        """All that was taken is in the content."""
        self.mark = {**self.mark, **self._taken}
        self._taken.clear()

    def abandoned(self) -> None:
        """What was taken and is not settled is forgotten: it will be taken again."""
        self._taken.clear()

    def at(self, versions: Mapping[str, str]) -> Mark:
        """The mark when nothing waits: what is known without a change (bookmarks) counts as well."""
        return {
            kind: msgspec.structs.replace(held, seen=version)
            if (version := parse_version(versions.get(kind, ""))) is not None and version > held.seen
            else held
            for kind, held in self.mark.items()
        }

    # --- overtaken ----------------------------------------------------------------------------------------------------

    @property
    def asked(self) -> bool:
        """A node is ahead, as far as is known."""
        return bool(self._asked)

    def overtaken(self, by: Mark) -> bool:
        """A node is ahead in these kinds. True if nobody was so far ahead before."""
        known = self._asked
        further = {
            kind: at
            for kind, at in by.items()
            if kind not in known or (at.epoch, at.changed) > (known[kind].epoch, known[kind].changed)
        }
        known.update(further)
        return bool(further)

    def behind(self, mark: Mark) -> bool:
        """Whether `mark` still lacks something that a node has; what it does not lack is forgotten."""
        self._asked = dict(lacking(mark, self._asked))
        return bool(self._asked)

    def listing(self) -> None:
        """Lists begin now: they answer what was asked before."""
        self._answerable = dict(self._asked)

    def _judge(self, kind: str, version: int, old: Position | None) -> int:
        """The epoch of a list at this version."""
        epoch = old.epoch if old else 0
        asked = self._answerable.pop(kind, None)
        if asked is not None and asked.epoch >= epoch:
            return asked.epoch if version >= asked.changed else self._next(asked.epoch)
        return self._next(epoch) if old is not None and version < old.seen else epoch

    def _next(self, epoch: int) -> int:
        return min(LARGEST, max(epoch + 1, int(self._wall() * 1000)))
