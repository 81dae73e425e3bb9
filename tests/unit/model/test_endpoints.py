"""Packed endpoints: canonical, and diff and patch are inverse."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcproxy.model import endpoints
from vcproxy.model.endpoints import NO_NODE, READY, SERVING, TERMINATING, Endpoint, HintSet

addresses = st.one_of(
    st.integers(0, 7).map(lambda n: bytes((10, 0, 0, n))), st.integers(0, 7).map(lambda n: bytes(15) + bytes((n,)))
)
hint_sets = st.one_of(
    st.none(), st.builds(HintSet, st.just((endpoints.name_id("zone-a"),)), st.sampled_from([(), (5,)]))
)
endpoint = st.builds(
    Endpoint,
    addresses,
    st.sampled_from([80, 8080]),
    st.integers(0, 7),
    st.sampled_from([NO_NODE, 3, 2**64 - 1]),
    hint_sets,
)


@given(st.lists(endpoint), st.randoms())
def test_packing_does_not_depend_on_order(items: list[Endpoint], random: object) -> None:
    shuffled = list(items)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert endpoints.pack(items) == endpoints.pack(shuffled)


@given(st.lists(endpoint))
def test_packed_is_canonical_and_unpacks(items: list[Endpoint]) -> None:
    packed4, packed6, hints = endpoints.pack(items)
    assert endpoints.is_canonical(packed4, 4)
    assert endpoints.is_canonical(packed6, 6)
    unpacked = endpoints.unpack(packed4, 4, hints) + endpoints.unpack(packed6, 6, hints)
    assert {(e.address, e.port) for e in unpacked} == {(e.address, e.port) for e in items}
    assert set(unpacked) <= set(items)


@given(st.lists(endpoint), st.lists(endpoint))
def test_patch_undoes_diff(before: list[Endpoint], after: list[Endpoint]) -> None:
    for family, old, new in zip((4, 6), endpoints.pack(before)[:2], endpoints.pack(after)[:2], strict=True):
        assert endpoints.patch(old, *endpoints.diff(old, new, family), family) == new


@pytest.mark.parametrize(
    "copies", list(itertools.permutations((TERMINATING | READY | SERVING, SERVING, READY | SERVING)))
)
def test_of_duplicates_the_ready_one_counts(copies: tuple[int, ...]) -> None:
    packed, _, _ = endpoints.pack(Endpoint(bytes((10, 0, 0, 1)), 80, flags) for flags in copies)
    assert [e.flags for e in endpoints.unpack(packed, 4)] == [READY | SERVING]


@pytest.mark.parametrize("copies", list(itertools.permutations((TERMINATING | SERVING, 0))))
def test_an_address_that_is_used_again_is_the_new_pods(copies: tuple[int, ...]) -> None:
    packed, _, _ = endpoints.pack(Endpoint(bytes((10, 0, 0, 1)), 80, flags) for flags in copies)
    assert [e.flags for e in endpoints.unpack(packed, 4)] == [0]


def test_not_canonical() -> None:
    one, _, _ = endpoints.pack([Endpoint(bytes((10, 0, 0, 1)), 80, READY)])
    two, _, _ = endpoints.pack([Endpoint(bytes((10, 0, 0, 2)), 80, READY)])
    assert endpoints.is_canonical(one + two, 4)
    assert not endpoints.is_canonical(two + one, 4)
    assert not endpoints.is_canonical(one + one, 4)
    assert not endpoints.is_canonical(one[:-1], 4)


def test_an_endpoint_costs_17_octets() -> None:
    packed4, packed6, _ = endpoints.pack([Endpoint(bytes(4), 1, READY), Endpoint(bytes(16), 1, READY)])
    assert (len(packed4), len(packed6)) == (17, 29)


def test_only_the_empty_name_is_no_node() -> None:
    assert endpoints.name_id("") == NO_NODE
    assert endpoints.name_id("node-1") not in (NO_NODE, endpoints.name_id("node-2"))
