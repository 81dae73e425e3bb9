"""A collection of objects as a reflector tells it, and what each event changes in it.

Sources that hold objects need the same rules: a complete list takes away what it lacks, but not what it could not read;
an object of the same name with another uid is another object; an object that cannot be read any more stays as it was.
What is held of an object is what the source makes of it, and nothing of those that mean nothing to it: a super cluster
has a Service for each of all tenants'.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Generic, NamedTuple, TypeVar

from vcproxy.kube.decode import HasKey, Key
from vcproxy.kube.reflector import Deleted, Event, Listed, Malformed, Upserted

T = TypeVar("T", bound=HasKey)
V = TypeVar("V")


class Change(NamedTuple, Generic[V]):
    """One object meant this (None: nothing, or it was not there) and means that now (None: nothing, or it is gone)."""

    key: Key
    old: V | None
    new: V | None


class Collection(Generic[T, V]):
    """`meaning`: what an object means, None for nothing. `unread`: objects never read; "" for one without a name."""

    def __init__(self, meaning: Callable[[T], V | None]) -> None:
        self.unread: set[str] = set()
        self._meaning = meaning
        self._uids: dict[Key, str] = {}
        self._values: dict[Key, V] = {}

    @property
    def values(self) -> Mapping[Key, V]:
        """What is held. A live read-only view."""
        return self._values

    def take(self, event: Event[T]) -> list[Change[V]]:
        """What the event changes; objects that go come first."""
        match event:
            case Listed(objects, errors):
                keys = {error.key for error in errors}
                self.unread = {_words(key) for key in keys if key not in self._values}
                present = {found.key for found in objects}
                missing = [] if None in keys else [key for key in self._values if key not in present | keys]
                return [*self._drop(*missing), *(change for found in objects for change in self._put(found))]
            case Upserted(found):
                return list(self._put(found))
            case Deleted(key):
                self.unread.discard(_words(key))
                return list(self._drop(key))
            case Malformed(error) if error.key not in self._values:
                self.unread.add(_words(error.key))
        return []

    def _put(self, found: T) -> Iterator[Change[V]]:
        key, uid, value = found.key, found.metadata.uid, self._meaning(found)
        self.unread.discard(_words(key))
        if value is None or self._uids.get(key, uid) != uid:
            yield from self._drop(key)
        if value is not None:
            old = self._values.get(key)
            self._uids[key], self._values[key] = uid, value
            if old != value:
                yield Change(key, old, value)

    def _drop(self, *keys: Key) -> Iterator[Change[V]]:
        for key in keys:
            if key in self._values:
                del self._uids[key]
                yield Change(key, self._values.pop(key), None)


def _words(key: Key | None) -> str:
    return "/".join(key) if key else ""
