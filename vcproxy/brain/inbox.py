"""Changes of one tenant that wait to be compiled: the newest form of each object, never a queue.

A tenant's API server decides how fast it writes, the brain how fast it compiles. Between them stands a table with one
place per object: a flood of changes to one object is one change, memory is bounded by the objects that exist, and a
list is nothing but many changes, with those that are missing from it as deletions. So there is one way for content to
arrive, and a batch is always a consistent whole: an endpoint that moves between slices of one list is never missing.
"""

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Literal, NamedTuple

from vcproxy.brain.compiler import Compilable, Key, Kind
from vcproxy.kube import shapes
from vcproxy.kube.errors import ShapeError
from vcproxy.kube.reflector import Deleted, Event, Listed, Malformed, Upserted
from vcproxy.model.timing import Timing

GONE: Literal["gone"] = "gone"
Item = Compilable | ShapeError | Literal["gone"]


class Batch(NamedTuple):
    """Everything that waited.

    `listed`: kinds of which a complete list is part of it. `events`: changes that went into it, lists not counted.
    """

    items: dict[tuple[Kind, Key], Item]
    listed: frozenset[Kind]
    timing: Timing
    events: int


class Inbox:
    """What waits of one tenant. `held(kind)` gives the keys that the consumer holds, the batch it works on included."""

    def __init__(self, *, held: Callable[[Kind], Iterable[Key]], wall_ns: Callable[[], int]) -> None:
        self._held = held
        self._wall_ns = wall_ns
        self._items: dict[tuple[Kind, Key], Item] = {}
        self._listed: set[Kind] = set()
        self._event_ns = 0
        self._received_ns = 0
        self._events = 0

    def __bool__(self) -> bool:
        return bool(self._items or self._listed)

    def take(self, kind: Kind, event: Event[Compilable]) -> None:
        """Remember a change of content. The state of the connection is none."""
        match event:
            case Listed(objects, errors):
                self._list(kind, objects, errors)
            case Upserted(found):
                self._put(kind, found.key, found)
                self._date(found)
                self._events += 1
            case Deleted(key):
                self._put(kind, key, GONE)
                self._events += 1
            case Malformed(error):
                self._malformed(kind, error)
                self._events += 1
            case _:
                return
        self.date()

    def date(self) -> None:
        """Something came in now: an object, or what its compiled form depends on."""
        self._received_ns = self._received_ns or self._wall_ns()

    def drain(self) -> Batch:
        """Everything that waits; nothing does afterwards."""
        timing = Timing(event=self._event_ns, received=self._received_ns)
        batch = Batch(self._items, frozenset(self._listed), timing, self._events)
        self._items, self._listed = {}, set()
        self._event_ns = self._received_ns = self._events = 0
        return batch

    def _list(self, kind: Kind, objects: tuple[Compilable, ...], errors: tuple[ShapeError, ...]) -> None:
        present = {found.key for found in objects}
        unread = {error.key for error in errors}
        if None not in unread:  # an error without a name might be of any object: then none is known to be gone
            waiting = [key for said, key in self._items if said == kind]
            for key in (*self._held(kind), *waiting):
                if key not in present and key not in unread:
                    self._put(kind, key, GONE)
        for found in objects:
            self._put(kind, found.key, found)
        for error in errors:
            self._malformed(kind, error)
        self._listed.add(kind)

    def _malformed(self, kind: Kind, error: ShapeError) -> None:
        """Takes no place from a good form of the object that still waits."""
        if error.key is not None and not isinstance(self._items.get((kind, error.key)), shapes.Object):
            self._put(kind, error.key, error)

    def _put(self, kind: Kind, key: Key, item: Item) -> None:
        self._items[kind, key] = item

    def _date(self, found: Compilable) -> None:
        if isinstance(found, shapes.EndpointSlice):
            trigger = _nanoseconds(found.metadata.annotations.last_change_trigger_time)
            if trigger and (not self._event_ns or trigger < self._event_ns):
                self._event_ns = trigger


def _nanoseconds(rfc3339: str) -> int:
    """Unix nanoseconds; 0 for what is no time. A tenant writes this: only a metric believes it."""
    try:
        return max(0, round(datetime.fromisoformat(rfc3339).timestamp() * 1e9)) if rfc3339 else 0
    except (ValueError, OverflowError, OSError):
        return 0
