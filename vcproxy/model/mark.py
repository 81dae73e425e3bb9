"""How new a content is: a place in the history of the API server that it came from, as all who follow it count.

A resourceVersion is a number that grows with each change (KEP-5504), and everybody who follows one API server sees the
same numbers. There is a position for each kind of objects, since each is a watch of its own and may lag alone. It is a
pair, because a watch says nothing while nothing changes: `changed`, where the content last may have changed, and
`seen`, up to where everything is known to be in it. Who has seen everything up to where another content changed has
nothing older than that one; so a quiet watch does not look like one that lags.

Histories are rewritten: an etcd is restored from a backup, or made anew, and versions begin at a lower number. An
`epoch` begins with each rewrite that somebody noticed, and what is of a later epoch is newer whatever the versions.
"""

from collections.abc import Mapping

import msgspec

LARGEST = 2**64 - 1
EPOCH_AHEAD_SECONDS = 86_400.0
"""An epoch of a later time than this from now is no time at which anybody noticed anything: whoever says so lies, or
had a clock that was wrong."""


class Position(msgspec.Struct, frozen=True):
    """Of one kind. `changed` and `seen` are resourceVersions, `epoch` is in Unix milliseconds; 0: no rewrite known."""

    changed: int
    seen: int
    epoch: int = 0


Mark = Mapping[str, Position]
"""Kind -> position. A kind that is missing cannot be compared: it is taken for neither new nor old."""

UNMARKED: Mark = {}


def parse_version(text: str) -> int | None:
    """A resourceVersion as a number; None if it is none."""
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        return None
    version = int(text)
    return version if version <= LARGEST else None


def lacking(mark: Mark, floor: Mark) -> Mark:
    """The kinds in which who is at `mark` may lack something of a content that is at `floor`, with their floors."""
    return {
        kind: wanted
        for kind, wanted in floor.items()
        if (held := mark.get(kind)) is not None and (held.epoch, held.seen) < (wanted.epoch, wanted.changed)
    }


def plausible(mark: Mark, now: float) -> Mark:
    """The positions whose epochs can be believed at that time (Unix seconds)."""
    latest = (now + EPOCH_AHEAD_SECONDS) * 1000
    return {kind: position for kind, position in mark.items() if position.epoch <= latest}


def raised(floor: Mark, mark: Mark) -> Mark:
    """The floor of whoever was at `floor` and took a content that is at `mark`, and not older.

    A kind that the new content does not speak of is of unknown age from now on.
    """
    return {kind: _higher(floor.get(kind, position), position) for kind, position in mark.items()}


def _higher(one: Position, other: Position) -> Position:
    return other if (other.epoch, other.changed) > (one.epoch, one.changed) else one
