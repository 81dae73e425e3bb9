"""Pools: the targets that a first packet may be sent to, as numbered slots of which the kernel picks one at random.

The kernel picks with `numgen random mod N`, where N is a constant of a rule; so there is a rule per N, and a pool's
value (32 bits, what a frontend map holds) says which: size class << 20 | pool number. The upper half of the numbers is
for pools with session affinity, so that a bit says whether clients may be bound, and not a look-up.

Size classes are exact up to 3,072 targets. Beyond, up to 65,536, sizes grow in 1,023 steps of 0.3 %, and the surplus
slots repeat the first targets: these get up to twice the share of others, which nobody can measure among thousands,
and a hostile tenant cannot make the node build a chain for each of 65,536 sizes.

Slots are dense and stable. A target that goes is replaced in place by one that comes in the same update, else by the
last slot; a target that only comes is appended. So a change costs as many elements as it has targets, plus at most
one each, and a client's chance of a target moves no more than it must.
"""

import bisect
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

EXACT_SIZES = 3072
MAX_TARGETS = 65_536
NUMBER_BITS = 20
NUMBERS = 1 << NUMBER_BITS
NUMBER_MASK = NUMBERS - 1
AFFINE = NUMBERS >> 1
"""The bit of a pool's number that says that it has affinity."""
CLASSES = 1 << (32 - NUMBER_BITS)

DROP = 1  # values of class 0
REJECT = 2

_STEPS = CLASSES - 1 - EXACT_SIZES
SIZES: tuple[int, ...] = (
    *range(EXACT_SIZES + 1),
    *(round(EXACT_SIZES * (MAX_TARGETS / EXACT_SIZES) ** (step / _STEPS)) for step in range(1, _STEPS + 1)),
)
"""Slots by size class, CLASSES of them; SIZES[0] is 0."""


def size_class(targets: int) -> int:
    """The class of a pool of so many targets, 1..MAX_TARGETS: the least with as many slots."""
    return targets if targets <= EXACT_SIZES else bisect.bisect_left(SIZES, targets)


def pool_value(number: int, targets: int) -> int:
    """What a frontend map holds for a pool."""
    return size_class(targets) << NUMBER_BITS | number


def expand(slots: bytes, width: int) -> bytes:
    """The targets of all slots of a pool's class, of which `slots` (packed targets, `width` octets each) come first."""
    count = len(slots) // width
    return slots if count <= EXACT_SIZES else slots + slots[: (SIZES[size_class(count)] - count) * width]


def arrange(old: bytes, wanted: bytes, width: int) -> bytes:
    """The slots that hold the `wanted` targets with the fewest slots changed.

    Both are packed targets of `width` octets without duplicates; the order of `wanted` says nothing.
    """
    if not old or not wanted:
        return wanted
    slots = split(old, width)
    targets = split(wanted, width)
    staying, held = set(targets), set(slots)
    coming = [target for target in targets if target not in held]
    holes = [index for index, target in enumerate(slots) if target not in staying]
    if not coming and not holes:
        return old
    for index, target in zip(holes, coming, strict=False):
        slots[index] = target
    slots += coming[len(holes) :]
    for index in reversed(holes[len(coming) :]):
        last = slots.pop()
        if index < len(slots):
            slots[index] = last
    return b"".join(slots)


def split(packed: bytes, width: int) -> list[bytes]:
    """Packed octets as a list of pieces of `width` octets."""
    return [packed[at : at + width] for at in range(0, len(packed), width)]


class SlotChange(NamedTuple):
    """A slot's target before and after; empty: no such slot."""

    slot: int
    before: bytes
    after: bytes


def slot_changes(old: bytes, new: bytes, width: int) -> Iterator[SlotChange]:
    """What differs between two arrangements, all slots of their classes included."""
    before, after = split(expand(old, width), width), split(expand(new, width), width)
    common = min(len(before), len(after))
    for slot in range(common):
        if before[slot] != after[slot]:
            yield SlotChange(slot, before[slot], after[slot])
    for slot in range(common, len(before)):
        yield SlotChange(slot, before[slot], b"")
    for slot in range(common, len(after)):
        yield SlotChange(slot, b"", after[slot])


class NumbersExhausted(Exception):
    """All numbers are in use."""


class Numbers:
    """Hands out numbers of a range, each as late as possible after its last use.

    Late, because a packet that looked up an old number a moment ago must not find another tenant's targets under it.
    """

    def __init__(self, first: int, last: int) -> None:
        """Both inclusive."""
        self._next = first
        self._last = last
        self._free: deque[int] = deque()
        self._taken: set[int] = set()  # ahead of _next

    def take(self) -> int:
        """A number that is not in use. Raises NumbersExhausted."""
        while self._next <= self._last:
            number = self._next
            self._next += 1
            if number not in self._taken:
                return number
            self._taken.discard(number)
        if not self._free:
            raise NumbersExhausted
        return self._free.popleft()

    @property
    def available(self) -> int:
        """How many numbers may be taken."""
        return self._last + 1 - self._next - len(self._taken) + len(self._free)

    def reserve(self, numbers: Iterable[int]) -> None:
        """Mark numbers as in use, before any was taken."""
        self._taken.update(numbers)

    def release(self, number: int) -> None:
        """Give back a number."""
        self._free.append(number)


class PoolNumbers:
    """The numbers of one family's pools."""

    def __init__(self) -> None:
        self._halves = (Numbers(0, AFFINE - 1), Numbers(AFFINE, NUMBERS - 1))

    def take(self, *, affine: bool) -> int:
        """A number that is not in use. Raises NumbersExhausted."""
        return self._halves[affine].take()

    def available(self, *, affine: bool) -> int:
        """How many numbers may be taken."""
        return self._halves[affine].available

    def reserve(self, numbers: Iterable[int]) -> None:
        """Mark numbers as in use, before any was taken."""
        found = set(numbers)
        affine = set(filter(is_affine, found))
        for half, mine in zip(self._halves, (found - affine, affine), strict=True):
            half.reserve(mine)

    def release(self, number: int) -> None:
        """Give back a number."""
        self._halves[is_affine(number)].release(number)


def is_affine(number: int) -> bool:
    """Whether a number is one of pools with affinity."""
    return bool(number & AFFINE)
