"""Durations in Go's form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcproxy.kubeproxy.duration import Duration


@pytest.mark.parametrize(
    ("text", "nanoseconds", "printed"),
    [
        ("0", 0, "0s"),
        ("0s", 0, "0s"),
        ("30s", 30 * 10**9, "30s"),
        ("1h30m", 5400 * 10**9, "1h30m0s"),
        ("24h0m0s", 86400 * 10**9, "24h0m0s"),
        ("1.5s", 15 * 10**8, "1.5s"),
        ("250ms", 25 * 10**7, "250ms"),
        ("1µs", 1000, "1µs"),
        ("-5m", -300 * 10**9, "-5m0s"),
        (".5m", 30 * 10**9, "30s"),
    ],
)
def test_parsed_and_printed_as_go_does(text: str, nanoseconds: int, printed: str) -> None:
    assert Duration.parse(text) == nanoseconds
    assert str(Duration.parse(text)) == printed


@pytest.mark.parametrize("text", ["", "5", "5x", "s", "1h 30m", "1.2.3s", "--5s", "9999999h"])
def test_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"duration|longer"):
        Duration.parse(text)


@given(st.integers(-(10**15), 10**15))
def test_what_is_printed_is_read_back(nanoseconds: int) -> None:
    assert Duration.parse(str(Duration(nanoseconds))) == nanoseconds
