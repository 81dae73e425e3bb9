"""Where the pods of a tenant given as manifests run, by its own files.

Pods among the manifests say it best. Without any, the EndpointSlices do (nodeName and address of each endpoint); then
nodes where the tenant has clients but no endpoints are not known, which is what one writes Pods for.
"""

from typing import Any

from vcproxy.brain.placement import Claim, Placement, slice_claims
from vcproxy.brain.sources import Kind
from vcproxy.brain.sources.attribution import Sole
from vcproxy.brain.sources.supercluster import Whereabouts
from vcproxy.kube.reflector import Deleted, Event, Listed, Upserted

Key = tuple[str, str]


class SelfPlaced:
    """Events about Pods, EndpointSlices and Nodes of one tenant `uid` into the placement."""

    def __init__(self, placement: Placement, uid: str) -> None:
        self._placement = placement
        self._uid = uid
        self._pods: set[Key] = set()
        self._slices: dict[Key, tuple[Claim, ...]] = {}
        self._whereabouts = Whereabouts(placement, attribution=Sole(uid))

    @property
    def listed(self) -> bool:
        """The files have been read once."""
        return "Pod" in self._whereabouts.listed

    def take(self, kind: Kind, event: Event[Any]) -> None:
        """One event; other kinds are ignored."""
        told_by_pods = bool(self._pods)
        self._whereabouts.take(kind, event)
        if kind == "Pod":
            _follow(self._pods, event)
        elif kind == "EndpointSlice":
            self._take_slice(event)
        if told_by_pods and not self._pods:
            for claims in self._slices.values():
                self._placement.move((), claims)
        elif self._pods and not told_by_pods:
            for claims in self._slices.values():
                self._placement.move(claims, ())

    def clear(self) -> None:
        """The tenant is gone."""
        self._whereabouts.clear()
        for key in list(self._slices):
            self._drop(key)

    def _take_slice(self, event: Event[Any]) -> None:
        match event:
            case Listed(objects):
                listed = {found.key for found in objects}
                for key in [key for key in self._slices if key not in listed]:
                    self._drop(key)
                for found in objects:
                    self._place(found.key, slice_claims(found, self._uid))
            case Upserted(found):
                self._place(found.key, slice_claims(found, self._uid))
            case Deleted(key):
                self._drop(key)

    def _place(self, key: Key, claims: tuple[Claim, ...]) -> None:
        old, self._slices[key] = self._slices.get(key, ()), claims
        if not self._pods:
            self._placement.move(old, claims)

    def _drop(self, key: Key) -> None:
        old = self._slices.pop(key, ())
        if not self._pods:
            self._placement.move(old, ())


def _follow(keys: set[Key], event: Event[Any]) -> None:
    match event:
        case Listed(objects):
            keys.clear()
            keys.update(found.key for found in objects)
        case Upserted(found):
            keys.add(found.key)
        case Deleted(key):
            keys.discard(key)
