"""The lab's SCTP, octet for octet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcproxy.lab.sctp import ABORT, INIT, INIT_ACK, Packet, crc32c, parse, payload

PORT, TAG = st.integers(0, 65535), st.integers(0, 2**32 - 1)


def test_checksum() -> None:
    """The check value of CRC-32C, as catalogues of CRCs have it."""
    assert crc32c(b"123456789") == 0xE3069283


@given(PORT, PORT, TAG, st.sampled_from([INIT, ABORT]), TAG)
def test_what_is_written_is_read(source: int, destination: int, tag: int, chunk: int, initiate: int) -> None:
    packet = Packet(source, destination, tag, chunk, 0 if chunk == ABORT else initiate)
    assert parse(packet.octets()) == packet


@given(st.binary(max_size=200))
def test_the_cookie_comes_back_whatever_its_length(cookie: bytes) -> None:
    packet = Packet(1, 2, 3, INIT_ACK, 4, cookie)
    assert parse(packet.octets()) == packet
    assert len(packet.octets()) % 4 == 0


@pytest.mark.parametrize("at", range(32))
def test_a_changed_octet_is_noticed(at: int) -> None:
    octets = bytearray(Packet(1000, 2000, 0, INIT, 7).octets())
    octets[at] ^= 1
    assert parse(bytes(octets)) is None


@given(st.binary(max_size=80))
def test_anything_can_be_parsed(octets: bytes) -> None:
    parse(octets)


def test_payload_of_ipv4() -> None:
    assert payload(bytes([0x46]) + bytes(23) + b"x") == b"x"
