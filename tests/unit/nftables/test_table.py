"""The static text: constant size, every map known by its octets, and loadable (the packet tests load it)."""

import re

import pytest

from vcproxy_nftables import table
from vcproxy_nftables.kernel import _SHAPES
from vcproxy_nftables.pools import EXACT_SIZES, SIZES


def test_every_map_of_the_text_has_its_octets_in_specs_and_the_other_way_round() -> None:
    named = re.findall(r"^  (?:map|set) (\S+) {", table.skeleton(), re.MULTILINE)
    assert sorted(named) == sorted(_SHAPES)


def test_every_chain_that_is_named_is_there() -> None:
    text = table.skeleton() + table.balance_text(4, [17]) + table.learn_text(6, [10800])
    made = set(re.findall(r"^  chain (\S+) {", text, re.MULTILINE))
    assert set(re.findall(r"(?:goto|jump) ([a-z0-9_]+)", text)) <= made


def test_the_layout_is_told_by_a_chain_of_its_own() -> None:
    assert re.fullmatch(r"layout_[0-9a-f]{16}", table.layout_chain())
    assert f"chain {table.layout_chain()} {{" in table.skeleton()


def test_no_anonymous_set_is_in_the_text() -> None:
    """Their names depend on history, so rules that use them could not be compared (see chains)."""
    rules = [line for line in table.skeleton().splitlines() if "dnat" not in line and "delete @" not in line]
    assert not [line for line in rules if re.search(r"^    .*\{", line)]


@pytest.mark.parametrize(
    ("size_class", "handle"), [(2, "20:0"), (17, "110:0"), (EXACT_SIZES, "c000:0"), (len(SIZES) - 1, "fff0:0")]
)
def test_a_size_class_is_the_upper_twelve_bits_of_meta_priority(size_class: int, handle: str) -> None:
    text = table.balance_text(6, [size_class])
    assert f"{{ {handle} : jump balance6_{SIZES[size_class]} }}" in text
    assert text.count(f"numgen random mod {SIZES[size_class]} ") == 3


def test_each_timeout_is_a_chain_for_the_three_protocols() -> None:
    text = table.learn_text(4, [10800, 5])
    assert text.count("timeout 10800s") == text.count("timeout 5s") == 3
