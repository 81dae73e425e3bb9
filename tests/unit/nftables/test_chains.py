"""The chains that a text should make: told the same way with and without a network namespace to make them in."""

from collections.abc import Callable
from typing import Any

import pytest

from vcproxy_nftables import chains, table
from vcproxy_nftables.kernel import run_nft


def load(text: str) -> None:
    run_nft("-f", "-", text=text)


@pytest.fixture(params=[True, False], ids=["zoning", "no zoning"])
def loaded(nft: Callable[[str], Any], request: pytest.FixtureRequest) -> chains.Extra:
    """Our table with chains made on demand, which are returned."""
    extra = chains.Extra({4: [20], 6: [30]}, {4: [10800], 6: []}, zoning=request.param)
    nft(f"flush ruleset\n{table.skeleton()}{extra.text()}")
    return extra


def test_both_ways_tell_what_the_kernel_has(loaded: chains.Extra) -> None:
    found = chains.read()
    assert chains.extra(found) == loaded
    assert chains.expected(loaded, load) == found
    assert chains.in_second_table(table.skeleton() + loaded.text(), load) == found


def test_the_second_table_has_no_hooks_and_is_gone_afterwards(loaded: chains.Extra, nft: Callable[[str], Any]) -> None:
    seen: list[dict[str, int]] = []

    def watching(text: str) -> None:
        load(text)
        hooked = [entry["chain"] for entry in nft("list chains") if "hook" in entry.get("chain", ())]
        tables = [entry["table"]["name"] for entry in nft("list tables") if "table" in entry]
        seen.append({name: sum(chain["table"] == name for chain in hooked) for name in tables})

    chains.in_second_table(table.skeleton(), watching)
    during, after = seen
    assert during[chains.REFERENCE] == 0
    assert during["vcproxy"] > 0
    assert after.keys() == {"vcproxy"}


def test_one_that_was_left_behind_is_no_trouble(loaded: chains.Extra) -> None:
    load(f"table inet {chains.REFERENCE} {{\n chain odd {{\n drop\n }}\n}}\n")
    assert "odd" not in chains.in_second_table(table.skeleton(), load)


def test_without_the_right_to_make_a_namespace(loaded: chains.Extra, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(chains, "_in_new_namespace", refuse)
    assert chains.expected(loaded, load) == chains.read()
