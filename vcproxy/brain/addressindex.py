"""Slices by the addresses of their endpoints, at 8 octets an endpoint.

Asked when the right to an address has changed, which is much rarer than that slices change: so putting a slice costs
one entry of a table, and the work is done when somebody asks, for as many slices as have changed since. What is asked
may name too many slices but never too few; that frees the index from following removals endpoint by endpoint.

Log-structured (O'Neil et al., The Log-Structured Merge-Tree, 1996): slices that changed lately are searched one by
one; beyond YOUNG of them they become a generation, arrays that are searched by halving; generations of like size become
one, made anew from the slices as they are then. So an endpoint is sorted again about as often as their number doubles.
"""

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vcproxy.brain.slices import PackedSlice
from vcproxy.model.endpoints import endpoint_dtype

Key = tuple[str, str]
Words = npt.NDArray[np.uint32]

YOUNG = 64
"""Slices that are searched one by one at most: 15 us."""
_OCTETS = {4: 4, 6: 16}


class _Generation(NamedTuple):
    """`words`: of every address, sorted; `numbers`: whose in `keys`, shape as words."""

    keys: list[Key]
    words: Words
    numbers: Words

    def find(self, word: int) -> Iterable[Key]:
        """The slices that had an address of this word."""
        typed = np.uint32(word)  # of another type, all words would be converted first
        first, last = self.words.searchsorted(typed, "left"), self.words.searchsorted(typed, "right")
        return [self.keys[number] for number in self.numbers[first:last]]


class AddressIndex:
    """Of one tenant. `held` gives a slice by its (namespace, name) as it is now; None: there is none."""

    def __init__(self, held: Callable[[Key], PackedSlice | None]) -> None:
        self._held = held
        self._young: dict[Key, None] = {}
        self._generations: list[_Generation] = []  # from old and large to new and small

    def put(self, key: Key) -> None:
        """The slice is new, or has other endpoints."""
        self._young[key] = None

    def drop(self, key: Key) -> None:
        """The slice is gone."""
        self._young.pop(key, None)

    def find(self, addresses: Collection[bytes]) -> set[Key]:
        """The slices that have any of these addresses."""
        if self._young and max(len(self._young), len(addresses)) > YOUNG:
            self._settle()
        found: set[Key] = set()
        for address in addresses:
            word = _word(address)
            found.update(self._having(address, self._young))
            for generation in self._generations:
                found.update(self._having(address, generation.find(word)))
        return found

    def _having(self, address: bytes, keys: Iterable[Key]) -> Iterable[Key]:
        for key in keys:
            held = self._held(key)
            if held is not None and _has(held, address):
                yield key

    def _settle(self) -> None:
        """Make what is young a generation, together with those that are not much larger."""
        keys = self._young
        self._young = {}
        while self._generations and len(self._generations[-1].keys) <= 2 * len(keys):
            keys.update(dict.fromkeys(self._generations.pop().keys))
        self._generations.append(self._generation(keys))

    def _generation(self, keys: Iterable[Key]) -> _Generation:
        slices = [(key, held) for key in keys if (held := self._held(key)) is not None]
        words, numbers = [np.empty(0, np.uint32)], [np.empty(0, np.uint32)]
        for family in (4, 6):
            size = endpoint_dtype(family).itemsize
            of_family = [(number, held) for number, (_, held) in enumerate(slices) if held.family == family]
            words.append(_words(b"".join(held.endpoints for _, held in of_family), family))
            counts = [len(held.endpoints) // size for _, held in of_family]
            numbers.append(np.repeat(np.array([number for number, _ in of_family], np.uint32), counts))
        together = np.concatenate(words)
        order = np.argsort(together)
        return _Generation([key for key, _ in slices], together[order], np.concatenate(numbers)[order])


def _has(held: PackedSlice, address: bytes) -> bool:
    size, at = endpoint_dtype(held.family).itemsize, held.endpoints.find(address)
    while at > 0 and at % size:  # octets that are not an address, or not all of one
        at = held.endpoints.find(address, at + 1)
    return at >= 0 and len(address) == _OCTETS[held.family]


def _word(address: bytes) -> int:
    """An address in 32 bits, as `_words` has it."""
    word = 0
    for at in range(0, len(address), 4):
        word ^= int.from_bytes(address[at : at + 4], "little")
    return word


def _words(packed: bytes, family: int) -> Words:
    """The addresses of packed endpoints in 32 bits each, shape (n,); IPv6 addresses are folded by exclusive or."""
    rows = np.frombuffer(packed, np.uint8).reshape(-1, endpoint_dtype(family).itemsize)
    parts = np.ascontiguousarray(rows[:, : _OCTETS[family]]).view("<u4")
    folded: Words = np.bitwise_xor.reduce(parts, axis=1).astype(np.uint32)
    return folded
