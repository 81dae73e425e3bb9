"""The ServiceCIDRs of one tenant, as its API server tells them: what its ClusterIPs may come from, in its own words."""

from contextlib import suppress
from typing import Any

from vcproxy.brain.compiler import Key
from vcproxy.kube import shapes
from vcproxy.kube.reflector import Deleted, Event, Listed, Upserted
from vcproxy.model.addresses import AddressError, Prefix, parse_prefix


class Ranges:
    """What was told last; an object of a wrong shape keeps its last good form."""

    def __init__(self) -> None:
        self._held: dict[Key, tuple[Prefix, ...]] = {}

    def prefixes(self) -> list[Prefix]:
        """All of them, not judged."""
        return [prefix for prefixes in self._held.values() for prefix in prefixes]

    def take(self, event: Event[Any]) -> bool:
        """Whether it says anything about them."""
        match event:
            case Listed(objects, errors):
                kept = {error.key for error in errors}
                if None not in kept:
                    self._held = {key: held for key, held in self._held.items() if key in kept}
                self._held |= {found.key: _prefixes(found) for found in objects}
            case Upserted(found):
                self._held[found.key] = _prefixes(found)
            case Deleted(key):
                self._held.pop(key, None)
            case _:
                return False
        return True


def _prefixes(found: shapes.ServiceCIDR) -> tuple[Prefix, ...]:
    prefixes: list[Prefix] = []
    for text in found.spec.cidrs:
        with suppress(AddressError):  # what is no CIDR holds no address
            prefixes.append(parse_prefix(text))
    return tuple(prefixes)
