"""Chunks to lines, whatever the sender does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcproxy.kube.backoff import Backoff
from vcproxy.kube.lines import HEAD, LineCutter, Oversized


@given(st.lists(st.binary(max_size=12)), st.lists(st.integers(0, 40), max_size=10), st.integers(1, 8))
def test_cutting_does_not_depend_on_the_chunks(lines: list[bytes], cuts: list[int], limit: int) -> None:
    lines = [line.replace(b"\n", b"") for line in lines]
    data = b"".join(line + b"\n" for line in lines)
    cutter, found, start = LineCutter(limit), [], 0
    for cut in [*sorted(cuts), len(data)]:
        found += cutter.feed(data[start:cut])
        start = max(start, cut)
    expected = [line if len(line) <= limit else Oversized(len(line), line[:HEAD]) for line in lines if line]
    assert found == expected
    assert not cutter.unfinished


def test_an_endless_line_is_not_kept() -> None:
    cutter = LineCutter(1000)
    for _ in range(10_000):
        assert cutter.feed(b"x" * 1000) == []
    assert sum(map(len, cutter._rest)) <= 1000
    assert cutter.feed(b"\nok\n") == [Oversized(10_000_000, b"x" * HEAD), b"ok"]


def test_a_line_without_end_is_unfinished() -> None:
    cutter = LineCutter(10)
    assert cutter.feed(b"abc") == [] and cutter.unfinished
    assert cutter.feed(b"\n") == [b"abc"] and not cutter.unfinished


@pytest.mark.parametrize(
    ("uniform", "expected"),
    [
        (lambda low, high: high, [1, 2, 4, 8, 10, 10]),
        (lambda low, high: low, [0.5, 1, 2, 4, 5, 5]),
    ],
    ids=["longest", "shortest"],
)
def test_backoff_doubles_to_its_cap_and_starts_again(uniform: object, expected: list[float]) -> None:
    backoff = Backoff(base=1, cap=10, uniform=uniform)  # type: ignore[arg-type]
    assert [backoff.next() for _ in expected] == expected
    assert backoff.next(at_least=99) == 99
    backoff.reset()
    assert backoff.next() == expected[0]
