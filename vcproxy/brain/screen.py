"""Which endpoints of a tenant's slices may be used, kept up to date as rights come and go.

A slice is held whole, and beside it, only where something of it is refused, the part that is admitted: a tenant that
leads to its own pods costs one look-up an endpoint when the slice arrives, and nothing when its services are compiled.
An index from address to slices makes a right that came or went cost the slices that have this very address.
"""

from collections.abc import Collection, Iterable
from typing import Protocol

import msgspec

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
    """The slices of one tenant before its `rights`. `key` is a slice's (namespace, name)."""

    def __init__(self, rights: Rights) -> None:
        self._rights = rights
        self._admitted: dict[Key, PackedSlice] = {}  # where it is not all of the slice
        self._slices: dict[bytes, Key | set[Key]] = {}  # by address

    def admitted(self, key: Key, held: PackedSlice) -> PackedSlice:
        """What of a slice may be used."""
        return self._admitted.get(key, held)

    def put(self, key: Key, held: PackedSlice, old: PackedSlice | None, uid: str) -> tuple[Refusal, ...]:
        """A slice is now so, and was `old`; returns what of it is refused."""
        now = addresses_of(held.endpoints, held.family)
        if old is None:
            self._index(now, key)
        elif old.endpoints != held.endpoints:
            before = set(addresses_of(old.endpoints, old.family))
            self._index(set(now) - before, key)
            self._unindex(before.difference(now), key)
        return self.judge(key, held, uid, now)

    def drop(self, key: Key, held: PackedSlice) -> None:
        """A slice is gone."""
        self._admitted.pop(key, None)
        self._unindex(set(addresses_of(held.endpoints, held.family)), key)

    def slices(self, addresses: Iterable[bytes]) -> set[Key]:
        """The slices that have any of these addresses."""
        found: set[Key] = set()
        for address in addresses:
            keys = self._slices.get(address)
            if isinstance(keys, set):
                found |= keys
            elif keys is not None:
                found.add(keys)
        return found

    def judge(self, key: Key, held: PackedSlice, uid: str, addresses: list[bytes] | None = None) -> tuple[Refusal, ...]:
        """Judge a slice that was put again; returns what of it is refused."""
        refused = self.refused(key, held, addresses)
        if not refused:
            self._admitted.pop(key, None)
            return ()
        rest = without(held.endpoints, held.family, refused)
        self._admitted[key] = msgspec.structs.replace(held, endpoints=rest)
        return tuple(_records(key, refused, uid))

    def refused(self, key: Key, held: PackedSlice, addresses: list[bytes] | None = None) -> dict[bytes, Reason]:
        """The addresses of a slice that may not be used now."""
        wanted = addresses if addresses is not None else addresses_of(held.endpoints, held.family)
        return self._rights.refused(wanted, (key[0], held.service))

    def _index(self, addresses: Collection[bytes], key: Key) -> None:
        held = self._slices
        if held.keys().isdisjoint(addresses):  # as good as always: no loop of ours
            held.update(dict.fromkeys(addresses, key))
            return
        for address in addresses:
            keys = held.setdefault(address, key)
            if isinstance(keys, set):
                keys.add(key)
            elif keys != key:
                held[address] = {keys, key}

    def _unindex(self, addresses: Iterable[bytes], key: Key) -> None:
        for address in addresses:
            keys = self._slices.get(address)
            if isinstance(keys, set):
                keys.discard(key)
                if len(keys) == 1:
                    self._slices[address] = keys.pop()
            elif keys == key:
                del self._slices[address]


def _records(key: Key, refused: dict[bytes, Reason], uid: str) -> Iterable[Refusal]:
    """One record a reason, with the least address as its example: whatever the order in which rights went."""
    for reason in sorted(set(refused.values())):
        found = [address for address, why in refused.items() if why is reason]
        example = format_address(min(found))
        yield Refusal("EndpointSlice", *key, FIELD, reason, example, len(found), CURES[reason], uid)
