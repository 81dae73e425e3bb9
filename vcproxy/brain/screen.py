"""Which endpoints of a tenant's slices may be used, kept up to date as rights come and go.

A slice is held whole, and beside it, only where something of it is refused, the part that is admitted: a tenant that
leads to its own pods costs one look-up an endpoint when the slice arrives, and nothing when its services are compiled.
An index makes a right that came or went cost the slices that have this very address.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Protocol

import msgspec

from vcproxy.brain.addressindex import AddressIndex
from vcproxy.brain.guard import CURES, Reason, Refusal
from vcproxy.brain.slices import PackedSlice, addresses_of, without
from vcproxy.model.addresses import format_address

Key = tuple[str, str]
FIELD = "endpoints[].addresses"


class Rights(Protocol):
    """A tenant's right to addresses; see ownership.Rights."""

    def refused(self, addresses: Collection[bytes], service: Key) -> dict[bytes, Reason]:
        """Those of the addresses where `service` may not have an endpoint, and why."""


class Screen:
    """The slices of one tenant before its `rights`. `key` is a slice's (namespace, name), `held` gives one by it."""

    def __init__(self, rights: Rights, held: Callable[[Key], PackedSlice | None]) -> None:
        self._rights = rights
        self._admitted: dict[Key, PackedSlice] = {}  # where it is not all of the slice
        self._index = AddressIndex(held)

    def admitted(self, key: Key, held: PackedSlice) -> PackedSlice:
        """What of a slice may be used."""
        return self._admitted.get(key, held)

    def put(self, key: Key, now: PackedSlice, uid: str) -> tuple[Refusal, ...]:
        """A slice is now so; returns what of it is refused."""
        self._index.put(key)
        return self.judge(key, now, uid)

    def drop(self, key: Key) -> None:
        """A slice is gone."""
        self._admitted.pop(key, None)
        self._index.drop(key)

    def slices(self, addresses: Collection[bytes]) -> set[Key]:
        """The slices that have any of these addresses."""
        return self._index.find(addresses)

    def judge(self, key: Key, held: PackedSlice, uid: str) -> tuple[Refusal, ...]:
        """Judge a slice that was put again; returns what of it is refused."""
        refused = self.refused(key, held)
        if not refused:
            self._admitted.pop(key, None)
            return ()
        rest = without(held.endpoints, held.family, refused)
        self._admitted[key] = msgspec.structs.replace(held, endpoints=rest)
        return tuple(_records(key, refused, uid))

    def refused(self, key: Key, held: PackedSlice) -> dict[bytes, Reason]:
        """The addresses of a slice that may not be used now."""
        return self._rights.refused(addresses_of(held.endpoints, held.family), (key[0], held.service))


def _records(key: Key, refused: dict[bytes, Reason], uid: str) -> Iterable[Refusal]:
    """One record a reason, with the least address as its example: whatever the order in which rights went."""
    for reason in sorted(set(refused.values())):
        found = [address for address, why in refused.items() if why is reason]
        example = format_address(min(found))
        yield Refusal("EndpointSlice", *key, FIELD, reason, example, len(found), CURES[reason], uid)
