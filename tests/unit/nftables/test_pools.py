"""Size classes, slots and numbers of pools."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcproxy_nftables.pools import (
    AFFINE,
    CLASSES,
    EXACT_SIZES,
    MAX_TARGETS,
    NUMBER_BITS,
    SIZES,
    Numbers,
    NumbersExhausted,
    PoolNumbers,
    arrange,
    expand,
    is_affine,
    pool_value,
    size_class,
    slot_changes,
    split,
)

targets = st.lists(st.integers(0, 30), unique=True, max_size=20).map(
    lambda numbers: b"".join(bytes((0, 0, 0, number, 0, 80)) for number in numbers)
)


def test_sizes_are_exact_where_it_can_be_seen_and_within_half_a_percent_elsewhere() -> None:
    assert len(SIZES) == CLASSES
    assert all(SIZES[size_class(count)] == count for count in range(1, EXACT_SIZES + 1))
    assert all(a < b for a, b in itertools.pairwise(SIZES))
    for count in range(EXACT_SIZES + 1, MAX_TARGETS + 1, 37):
        assert count <= SIZES[size_class(count)] <= count * 1.005 + 1
    assert SIZES[size_class(MAX_TARGETS)] == MAX_TARGETS


def test_a_pool_value_has_the_class_above_the_number() -> None:
    assert pool_value(5, 3) == 3 << NUMBER_BITS | 5
    assert pool_value((1 << NUMBER_BITS) - 1, MAX_TARGETS) == 0xFFFFFFFF


def test_surplus_slots_repeat_the_first_targets() -> None:
    slots = b"".join(number.to_bytes(6, "big") for number in range(5000))
    whole = expand(slots, 6)
    assert len(whole) // 6 == SIZES[size_class(5000)]
    assert whole.startswith(slots)
    assert set(split(whole, 6)) == set(split(slots, 6))


@given(targets, targets)
def test_arranging_holds_what_is_wanted_and_moves_no_more_than_it_must(old: bytes, wanted: bytes) -> None:
    new = arrange(old, wanted, 6)
    assert sorted(split(new, 6)) == sorted(split(wanted, 6))
    before, after = set(split(old, 6)), set(split(wanted, 6))
    leaving, coming = len(before - after), len(after - before)
    if old and wanted:
        # Each hole is filled once (by a coming target or the last slot), each further coming target is appended, and
        # each slot too many goes.
        assert len(list(slot_changes(old, new, 6))) <= max(leaving, coming) + max(0, leaving - coming)


def test_a_replaced_target_takes_the_slot_of_the_one_that_left() -> None:
    old = b"aaaaaabbbbbbcccccc"
    assert arrange(old, b"aaaaaaccccccdddddd", 6) == b"aaaaaaddddddcccccc"


def test_the_last_slot_moves_into_the_hole() -> None:
    assert arrange(b"aaaaaabbbbbbcccccc", b"bbbbbbcccccc", 6) == b"ccccccbbbbbb"


@given(targets, targets)
def test_slot_changes_turn_one_arrangement_into_the_other(old: bytes, new: bytes) -> None:
    slots = dict(enumerate(split(old, 6)))
    for slot, before, after in slot_changes(old, new, 6):
        assert slots.get(slot, b"") == before
        if after:
            slots[slot] = after
        else:
            del slots[slot]
    assert slots == dict(enumerate(split(new, 6)))


def test_numbers_come_back_as_late_as_possible() -> None:
    numbers = Numbers(1, 4)
    numbers.reserve([2])
    assert numbers.available == 3
    first = numbers.take()
    numbers.release(first)
    assert [numbers.take() for _ in range(3)] == [3, 4, first]
    with pytest.raises(NumbersExhausted):
        numbers.take()
    numbers.release(2)
    assert numbers.take() == 2


def test_pools_with_affinity_have_numbers_of_their_own() -> None:
    numbers = PoolNumbers()
    numbers.reserve([0, AFFINE])
    plain, affine = numbers.take(affine=False), numbers.take(affine=True)
    assert (plain, affine) == (1, AFFINE + 1)
    assert (is_affine(plain), is_affine(affine)) == (False, True)
    assert numbers.available(affine=False) == numbers.available(affine=True) == AFFINE - 2
    numbers.release(affine)
    assert numbers.available(affine=False) == AFFINE - 2
    assert numbers.available(affine=True) == AFFINE - 1
