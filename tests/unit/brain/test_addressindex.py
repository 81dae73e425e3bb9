"""Which slices have an address: never too few, and found without looking at all of them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vcproxy.brain.addressindex import YOUNG, AddressIndex, Key
from vcproxy.brain.slices import PackedSlice, addresses_of
from vcproxy.model.endpoints import Endpoint, pack

V4 = [bytes([10, 0, 0, number]) for number in range(6)]
V6 = [bytes([0xFD, *bytes(14), number]) for number in range(6)]
# Two addresses that fold to one word.
V6 += [bytes(15) + b"\x01", b"\x01".rjust(12, b"\0") + bytes(4)]


def packed(*addresses: bytes) -> PackedSlice:
    family = 4 if len(addresses[0]) == 4 else 6
    records = pack([Endpoint(address, 0, 3) for address in addresses])
    return PackedSlice("web", family, (), records[0] if family == 4 else records[1], ())


SLICES = st.one_of(
    st.lists(st.sampled_from(V4), min_size=1, max_size=3).map(lambda some: packed(*some)),
    st.lists(st.sampled_from(V6), min_size=1, max_size=3).map(lambda some: packed(*some)),
)
NAMES = st.integers(0, 3 * YOUNG).map(lambda number: ("default", f"web-{number}"))
STEPS = st.one_of(
    st.tuples(st.just("put"), st.lists(st.tuples(NAMES, SLICES), max_size=2 * YOUNG)),
    st.tuples(st.just("drop"), st.lists(NAMES, max_size=YOUNG)),
    st.tuples(st.just("find"), st.lists(st.sampled_from(V4 + V6), min_size=1, max_size=3)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(STEPS, max_size=12))
def test_what_is_found_is_what_there_is(steps) -> None:
    held: dict[Key, PackedSlice] = {}
    index = AddressIndex(held.get)
    for what, arguments in steps:
        if what == "put":
            for key, found in arguments:
                held[key] = found
                index.put(key)
        elif what == "drop":
            for key in arguments:
                held.pop(key, None)
                index.drop(key)
        else:
            wanted = {
                key
                for key, found in held.items()
                if not set(arguments).isdisjoint(addresses_of(found.endpoints, found.family))
            }
            assert index.find(arguments) == wanted


def test_finding_looks_at_few_slices_whatever_their_number() -> None:
    held = {
        ("default", f"web-{number}"): packed(*(bytes([10, number >> 8, number & 255, at]) for at in range(10)))
        for number in range(5_000)
    }
    looks = 0

    def look(key: Key) -> PackedSlice | None:
        nonlocal looks
        looks += 1
        return held.get(key)

    index = AddressIndex(look)
    for key in held:
        index.put(key)
    assert index.find([bytes([10, 1, 1, 5])]) == {("default", "web-257")}
    looks = 0
    for number in range(1_000):
        key = ("default", f"web-{number}")
        held[key] = packed(bytes([10, 200, number >> 8, number & 255]))
        index.put(key)
        assert index.find([bytes([10, 200, number >> 8, number & 255])]) == {key}
        assert index.find([bytes([10, number >> 8, number & 255, 5])]) == set()
    assert looks / 2_000 < 2 * YOUNG
