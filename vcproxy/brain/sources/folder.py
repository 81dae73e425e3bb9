"""The objects of one folder of manifests, told as an API server would tell them.

Additions and changes are passed on at once, removals only when they have lasted for a second: an editor that saves, a
`cp` that overwrites, a `git checkout` take files away for a moment, and nobody's Services may go with them.
"""

import asyncio
from collections.abc import Mapping
from typing import NoReturn

from vcproxy.brain.sources import Kind, ObjectSink
from vcproxy.brain.sources.manifests import KINDS, Key, Object
from vcproxy.kube.reflector import Deleted, Listed, Upserted

REMOVAL_SECONDS = 1.0
"""How long something must be missing to be gone."""

Objects = Mapping[tuple[Kind, Key], Object]


class Folder:
    """An Input (see sources) that is told by `update` what there is. Nothing is said before the first update."""

    def __init__(self) -> None:
        self._held: dict[tuple[Kind, Key], Object] | None = None
        self._missing: dict[tuple[Kind, Key], float] = {}
        self._sink: ObjectSink | None = None

    def update(self, objects: Objects, *, now: float) -> float | None:
        """All objects there are, at the time `now`. Returns when to call again even if nothing changes, or None."""
        if self._held is None:
            self._held = dict(objects)
            self._list()
            return None
        for place, found in objects.items():
            if self._held.get(place) != found:
                self._held[place] = found
                if self._sink:
                    self._sink(place[0], Upserted(found))
        self._missing = {place: self._missing.get(place, now) for place in self._held if place not in objects}
        for place in [place for place, since in self._missing.items() if now - since >= REMOVAL_SECONDS]:
            uid = self._held.pop(place).metadata.uid
            del self._missing[place]
            if self._sink:
                self._sink(place[0], Deleted(place[1], uid))
        return min(self._missing.values()) + REMOVAL_SECONDS if self._missing else None

    @property
    def versions(self) -> Mapping[str, str]:
        """None: files have no history that another reader could compare."""
        return {}

    async def run(self, sink: ObjectSink) -> NoReturn:
        """List what there is, then tell of changes."""
        self._sink = sink
        try:
            self._list()
            while True:
                await asyncio.Event().wait()
        finally:
            self._sink = None

    def _list(self) -> None:
        if self._sink is None or self._held is None:
            return
        for kind in KINDS:
            self._sink(kind, Listed(tuple(found for place, found in self._held.items() if place[0] == kind), ()))
