"""Addresses and prefixes as Kubernetes writes them."""

import pytest

from vcproxy.model.addresses import AddressError, Prefix, format_address, format_target, parse_address, parse_prefix


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("172.030.0.041", "172.30.0.41"),  # legacy leading zeros are decimal, never octal
        (" 10.0.0.1 ", "10.0.0.1"),
        ("fd00::1", "fd00::1"),
        ("FD00:0:0::1", "fd00::1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("0.0.0.0", "0.0.0.0"),
    ],
)
def test_parse_address(text: str, canonical: str) -> None:
    assert format_address(parse_address(text)) == canonical


@pytest.mark.parametrize(
    "text", ["", "10.0.0", "10.0.0.256", "a.b.c.d", "fe80::1%eth0", "10.0.0.1/24", "1" * 500, "10.0.0.1\0"]
)
def test_not_an_address(text: str) -> None:
    with pytest.raises(AddressError):
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("10.32.0.0/16", "10.32.0.0/16"),
        ("10.32.7.9/16", "10.32.0.0/16"),
        ("010.032.000.000/16", "10.32.0.0/16"),
        ("fd00:32::/108", "fd00:32::/108"),
        ("10.0.0.1", "10.0.0.1/32"),
        (" 203.0.113.0/25 ", "203.0.113.0/25"),
        ("0.0.0.0/0", "0.0.0.0/0"),
    ],
)
def test_parse_prefix(text: str, canonical: str) -> None:
    assert str(parse_prefix(text)) == canonical


@pytest.mark.parametrize("text", ["10.0.0.0/33", "fd00::/129", "10.0.0.0/", "10.0.0.0/-1", "10.0.0.0/a", "/8"])
def test_not_a_prefix(text: str) -> None:
    with pytest.raises(AddressError):
        parse_prefix(text)


def test_prefix_covers_only_its_family_and_range() -> None:
    prefix = parse_prefix("10.32.0.0/16")
    assert prefix.covers(parse_address("10.32.255.255"))
    assert not prefix.covers(parse_address("10.33.0.0"))
    assert not prefix.covers(parse_address("fd00::1"))
    assert Prefix(bytes(16), 0).covers(parse_address("fd00::1"))


def test_format_target() -> None:
    assert format_target(parse_address("10.0.0.1"), 80) == "10.0.0.1:80"
    assert format_target(parse_address("fd00::1"), 80) == "[fd00::1]:80"
