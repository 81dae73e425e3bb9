"""What the encoder writes is what nft reads, and what nft writes is what the decoder reads."""

import ipaddress
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vcproxy_nftables.batch import Batch
from vcproxy_nftables.elements import MapSpec, Ranges, encode_verdict, following
from vcproxy_nftables.netlink import Nfnetlink

pytestmark = pytest.mark.packets

Nft = Callable[[str], Any]

FRONTENDS = MapSpec("frontends", 12, 4)
FRONTENDS6 = MapSpec("frontends6", 24, 4)
ENDPOINTS = MapSpec("endpoints", 8, 8)
ENDPOINTS6 = MapSpec("endpoints6", 8, 20)
INTERFACES = MapSpec("interfaces", 16, 2)
ADDRESSES = MapSpec("addresses", 4, 2)
NODEPORTS = MapSpec("nodeports", 2, 4)
AFFINITY = MapSpec("affinity", 8, 8)
BALANCE = MapSpec("balance", 4, verdict=True)
POOLS = MapSpec("pools", 4)
HAIRPIN = MapSpec("hairpin", 12)
RANGES = MapSpec("ranges", 8, ranges=Ranges.CONCATENATED)
ALLOWED = MapSpec("allowed", 16, ranges=Ranges.CONCATENATED)
SOURCES = MapSpec("sources", 4, ranges=Ranges.SINGLE)


def ip(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def host2(number: int) -> bytes:
    return struct.pack("=H", number)


def host4(number: int) -> bytes:
    return struct.pack("=I", number)


def port(number: int) -> bytes:
    return struct.pack(">H", number)


PAD = bytes(2)

PLAIN = [
    (FRONTENDS, host2(7) + PAD + ip("10.96.0.1") + port(80) + PAD, host4(0x400005), "7 . 10.96.0.1 . 80 : 40:5"),
    (FRONTENDS6, host2(700) + PAD + ip("fd00::1") + port(443) + PAD, host4(0x10002), "700 . fd00::1 . 443 : 1:2"),
    (ENDPOINTS, host4(0x400005) + host4(3), ip("10.1.2.3") + port(8080) + PAD, "40:5 . 3 : 10.1.2.3 . 8080"),
    (ENDPOINTS6, host4(0x400005) + host4(300), ip("fd00::2") + port(53) + PAD, "40:5 . 300 : fd00::2 . 53"),
    (INTERFACES, b"vx-acme".ljust(16, b"\0"), host2(513), '"vx-acme" : 513'),
    (ADDRESSES, ip("10.2.0.9"), host2(9), "10.2.0.9 : 9"),
    (NODEPORTS, port(30080), host4(0x400005), "30080 : 40:5"),
    (POOLS, host4(0x400005), None, "40:5"),
    (HAIRPIN, host2(7) + PAD + ip("10.1.0.1") + ip("10.1.0.1"), None, "7 . 10.1.0.1 . 10.1.0.1"),
]

RANGED = [
    # Sets of ranges compare big endian, and so are host-order fields: zone 7 is 00 07.
    (RANGES, port(7) + PAD + ip("10.96.0.0"), port(7) + PAD + ip("10.96.255.255"), "7 . 10.96.0.0/16"),
    (RANGES, port(7) + PAD + ip("10.96.0.1"), port(7) + PAD + ip("10.96.0.1"), "7 . 10.96.0.1"),
    (
        ALLOWED,
        port(7) + PAD + ip("10.96.0.1") + port(80) + PAD + ip("192.0.2.0"),
        port(7) + PAD + ip("10.96.0.1") + port(80) + PAD + ip("192.0.2.255"),
        "7 . 10.96.0.1 . 80 . 192.0.2.0/24",
    ),
    (SOURCES, ip("10.0.0.0"), ip("10.0.255.255"), "10.0.0.0/16"),
    (SOURCES, ip("10.0.0.9"), ip("10.0.0.9"), "10.0.0.9"),
    (SOURCES, ip("192.0.2.3"), ip("192.0.2.200"), "192.0.2.3-192.0.2.200"),
    (SOURCES, ip("255.255.255.0"), ip("255.255.255.255"), "255.255.255.0/24"),
    (SOURCES, ip("0.0.0.0"), ip("255.255.255.255"), "0.0.0.0/0"),
]


def _named(value: object) -> str:
    return value.name if isinstance(value, MapSpec) else value if isinstance(value, str) else ""


@pytest.fixture
def kernel(table: Nft) -> Iterator[Nfnetlink]:
    netlink = Nfnetlink()
    yield netlink
    netlink.close()


def listed(nft: Nft, name: str) -> list[Any]:
    """Elements as nft lists them in JSON."""
    kind = "set" if name in ("pools", "hairpin", "ranges", "allowed", "sources") else "map"
    entry = next(entry[kind] for entry in nft(f"list {kind} inet vcproxy {name}") if kind in entry)
    return list(entry.get("elem", []))


def as_text(matrix: Any) -> list[bytes]:
    return [row.tobytes() for row in matrix]


@pytest.mark.parametrize(("spec", "key", "data", "element"), PLAIN, ids=_named)
def test_nft_lists_what_we_add_as_what_it_would_add(
    spec: MapSpec, key: bytes, data: bytes | None, element: str, table: Nft, kernel: Nfnetlink
) -> None:
    table(f"add element inet vcproxy {spec.name} {{ {element} }}")
    by_nft = listed(table, spec.name)
    found = kernel.dump(spec)
    assert as_text(found.keys) == [key]
    assert as_text(found.data) == [data or b""]

    batch = kernel.batch()
    batch.remove(spec, key)
    kernel.commit(batch)
    assert listed(table, spec.name) == []

    batch = kernel.batch()
    batch.add(spec, key, data)
    kernel.commit(batch)
    assert listed(table, spec.name) == by_nft


@pytest.mark.parametrize(("spec", "first", "last", "element"), RANGED, ids=_named)
def test_ranges_are_those_of_nft(
    spec: MapSpec, first: bytes, last: bytes, element: str, table: Nft, kernel: Nfnetlink
) -> None:
    table(f"add element inet vcproxy {spec.name} {{ {element} }}")
    by_nft = listed(table, spec.name)
    found = kernel.dump(spec)
    assert found.ends is not None
    assert (as_text(found.keys), as_text(found.ends)) == ([first], [last])

    batch = kernel.batch()
    batch.remove_interval(spec, first, last)
    kernel.commit(batch)
    assert listed(table, spec.name) == []

    batch = kernel.batch()
    batch.add_interval(spec, first, last)
    kernel.commit(batch)
    assert listed(table, spec.name) == by_nft


@pytest.mark.parametrize(
    ("verdict", "as_json"),
    [
        ("goto one", {"goto": {"target": "one"}}),
        ("jump two", {"jump": {"target": "two"}}),
        ("drop", {"drop": None}),
        ("accept", {"accept": None}),
        ("return", {"return": None}),
    ],
)
def test_verdicts(verdict: str, as_json: Any, table: Nft, kernel: Nfnetlink) -> None:
    batch = kernel.batch()
    batch.add(BALANCE, host4(0x400000), verdicts=[verdict])
    kernel.commit(batch)
    assert [element[1] for element in listed(table, "balance")] == [as_json]
    assert list(kernel.dump(BALANCE).verdicts) == [verdict]

    batch = kernel.batch()
    batch.remove(BALANCE, host4(0x400000))
    kernel.commit(batch)
    assert listed(table, "balance") == []


def test_comments_are_those_of_nft(table: Nft, kernel: Nfnetlink) -> None:
    batch = kernel.batch()
    keys = np.frombuffer(host4(1) + host4(2) + host4(3), np.uint8).reshape(3, 4)
    batch.add(POOLS, keys, comments=["short", "a comment that is longer", ""])
    batch.add_interval(SOURCES, ip("10.0.0.0"), ip("10.0.0.255"), comments=["pods"])
    kernel.commit(batch)
    table('add element inet vcproxy pools { 0:4 comment "by nft" }')
    comments = {element["elem"]["val"]: element["elem"].get("comment") for element in listed(table, "pools")[:3]}
    assert sorted(filter(None, comments.values()))[0] == "a comment that is longer"
    found = kernel.dump(POOLS)
    assert dict(zip(as_text(found.keys), found.comments, strict=True)) == {
        host4(1): "short",
        host4(2): "a comment that is longer",
        host4(3): "",
        host4(4): "by nft",
    }
    assert list(kernel.dump(SOURCES).comments) == ["pods"]


def test_affinity_entries_are_restored_with_the_time_they_had_left(table: Nft, kernel: Nfnetlink) -> None:
    keys = host4(1) + ip("10.0.0.1") + host4(2) + ip("10.0.0.2")
    batch = kernel.batch()
    batch.add(
        AFFINITY,
        keys,
        2 * (ip("10.1.0.1") + port(80) + PAD),
        expirations=np.array([60_000, 7_200_000], np.uint64),
    )
    kernel.commit(batch)
    found = kernel.dump(AFFINITY)
    left = dict(zip(as_text(found.keys), found.expirations.tolist(), strict=True))
    assert 50_000 < left[keys[:8]] <= 60_000
    assert 7_190_000 < left[keys[8:]] <= 7_200_000
    assert len(listed(table, "affinity")) == 2


def test_elements_that_expired_may_be_removed(kernel: Nfnetlink) -> None:
    batch = kernel.batch()
    batch.remove(AFFINITY, host4(1) + ip("10.0.0.1"), missing_ok=True)
    batch.remove(AFFINITY, (host4(1) + ip("10.0.0.1")) * 9, missing_ok=True)
    kernel.commit(batch)


addresses = st.integers(0, 2**32 - 1).map(lambda number: number.to_bytes(4, "big"))
ports = st.integers(1, 65535).map(port)
pools = st.integers(1, 2**32 - 2).map(host4)
zones = st.integers(0, 65535).map(host2)
frontends = st.dictionaries(
    st.builds(lambda zone, address, number: zone + PAD + address + number + PAD, zones, addresses, ports),
    pools,
    max_size=40,
)
endpoints = st.dictionaries(
    st.builds(lambda pool, slot: pool + host4(slot), pools, st.integers(0, 65535)),
    st.tuples(
        st.builds(lambda address, number: address + number + PAD, addresses, ports),
        st.text("abcdefghij /-.", max_size=60).map(str.strip),
    ),
    max_size=40,
)
cuts = st.lists(st.integers(0, 2**32 - 1), unique=True, max_size=40).map(sorted)


def _shown_frontend(element: Any) -> bytes:
    zone, address, number = element[0]["concat"]
    return host2(zone) + PAD + ip(address) + port(number) + PAD


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=frontends, after=frontends)
def test_frontends_read_back_as_meant(table: Nft, kernel: Nfnetlink, before: Any, after: Any) -> None:
    table("flush map inet vcproxy frontends")
    batch = kernel.batch()
    batch.add(FRONTENDS, b"".join(before), b"".join(before.values()))
    kernel.commit(batch)
    batch = kernel.batch()
    batch.remove(FRONTENDS, b"".join(key for key in before if key not in after))
    changed = [key for key in before if key in after]
    batch.replace(FRONTENDS, b"".join(changed), b"".join(after[key] for key in changed))
    new = [key for key in after if key not in before]
    batch.add(FRONTENDS, b"".join(new), b"".join(after[key] for key in new), exclusive=True)
    assert len(batch) == len(before.keys() - after) + 2 * len(changed) + len(new)
    kernel.commit(batch)
    found = kernel.dump(FRONTENDS)
    assert dict(zip(as_text(found.keys), as_text(found.data), strict=True)) == after
    assert {_shown_frontend(element) for element in listed(table, "frontends")} == after.keys()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=endpoints)
def test_endpoints_with_comments_read_back_as_meant(table: Nft, kernel: Nfnetlink, wanted: Any) -> None:
    table("flush map inet vcproxy endpoints")
    batch = kernel.batch()
    batch.add(
        ENDPOINTS,
        b"".join(wanted),
        b"".join(data for data, _ in wanted.values()),
        comments=[comment for _, comment in wanted.values()],
    )
    kernel.commit(batch)
    found = kernel.dump(ENDPOINTS)
    rows = zip(as_text(found.data), found.comments, strict=True)
    assert dict(zip(as_text(found.keys), rows, strict=True)) == wanted
    assert len(listed(table, "endpoints")) == len(wanted)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=cuts)
def test_ranges_read_back_as_meant(table: Nft, kernel: Nfnetlink, cuts: list[int]) -> None:
    table("flush set inet vcproxy sources\nflush set inet vcproxy ranges")
    whole = list(zip(cuts[::2], cuts[1::2], strict=False))
    first = b"".join(low.to_bytes(4, "big") for low, _ in whole)
    last = b"".join(high.to_bytes(4, "big") for _, high in whole)
    zone = port(7) + PAD
    zoned_first = b"".join(zone + low.to_bytes(4, "big") for low, _ in whole)
    zoned_last = b"".join(zone + high.to_bytes(4, "big") for _, high in whole)
    batch = kernel.batch()
    batch.add_interval(SOURCES, first, last)
    batch.add_interval(RANGES, zoned_first, zoned_last)
    kernel.commit(batch)
    for spec, width in ((SOURCES, 4), (RANGES, 8)):
        found = kernel.dump(spec)
        assert found.ends is not None
        read = sorted(
            (int.from_bytes(low[width - 4 :], "big"), int.from_bytes(high[width - 4 :], "big"))
            for low, high in zip(as_text(found.keys), as_text(found.ends), strict=True)
        )
        assert read == whole
    assert len(listed(table, "sources")) == len(whole)
    batch = kernel.batch()
    batch.remove_interval(SOURCES, first, last)
    batch.remove_interval(RANGES, zoned_first, zoned_last)
    kernel.commit(batch)
    assert len(kernel.dump(SOURCES).keys) == len(kernel.dump(RANGES).keys) == 0


def test_ranges_that_touch_stay_two(kernel: Nfnetlink) -> None:
    batch = kernel.batch()
    batch.add_interval(SOURCES, ip("10.0.1.0") + ip("10.0.0.0"), ip("10.0.1.255") + ip("10.0.0.255"))
    kernel.commit(batch)
    found = kernel.dump(SOURCES)
    assert found.ends is not None
    assert as_text(found.keys) == [ip("10.0.0.0"), ip("10.0.1.0")]
    assert as_text(found.ends) == [ip("10.0.0.255"), ip("10.0.1.255")]


def test_one_element_is_written_as_many_are() -> None:
    one, many = Batch(), Batch()
    one.add(ENDPOINTS, bytes(range(8)), bytes(range(8, 16)))
    many.add(ENDPOINTS, bytes(range(8)) * 2, bytes(range(8, 16)) * 2)
    record = struct.pack("=HHHHHH", 28 + 8, 0x8001, 16, 0x8001, 12, 1) + bytes(range(8))
    record += struct.pack("=HHHH", 16, 0x8002, 12, 1) + bytes(range(8, 16))
    assert one.message().count(record) == 1
    assert many.message().count(record) == 2


@pytest.mark.parametrize(
    ("last", "next_one", "endless"),
    [("00000000", "00000001", False), ("0a00ffff", "0a010000", False), ("ffffffff", "00000000", True)],
)
def test_following(last: str, next_one: str, endless: bool) -> None:
    rows, ends = following(np.frombuffer(bytes.fromhex(last), np.uint8).reshape(1, 4))
    assert (rows.tobytes().hex(), bool(ends[0])) == (next_one, endless)


@pytest.mark.parametrize(
    "ask",
    [
        lambda batch: batch.add(ENDPOINTS, bytes(8)),
        lambda batch: batch.add(ENDPOINTS, bytes(8), bytes(7)),
        lambda batch: batch.add(ENDPOINTS, bytes(9), bytes(8)),
        lambda batch: batch.add(ENDPOINTS, bytes(16), bytes(8)),
        lambda batch: batch.add(ENDPOINTS, np.zeros((2, 7), np.uint8), np.zeros((2, 8), np.uint8)),
        lambda batch: batch.add(ENDPOINTS, np.zeros((2, 8), np.uint16), np.zeros((2, 8), np.uint8)),
        lambda batch: batch.add(POOLS, bytes(4), bytes(4)),
        lambda batch: batch.add(POOLS, bytes(8), comments=["only one"]),
        lambda batch: batch.add(POOLS, bytes(4), comments=["x" * 128]),
        lambda batch: batch.add(BALANCE, bytes(4)),
        lambda batch: batch.add(BALANCE, bytes(4), verdicts=["goto"]),
        lambda batch: batch.add(BALANCE, bytes(4), verdicts=["fly"]),
        lambda batch: batch.add(RANGES, bytes(8)),
        lambda batch: batch.remove(RANGES, bytes(8)),
        lambda batch: batch.add_interval(POOLS, bytes(4), bytes(4)),
        lambda batch: batch.add_interval(RANGES, bytes(8), bytes(16)),
        lambda batch: batch.message(),
    ],
)
def test_wrong_shapes_are_refused_before_the_kernel_sees_them(ask: Callable[[Batch], object]) -> None:
    batch = Batch()
    with pytest.raises(ValueError, match=r"octets|keys|multiple|need|must|comment|verdict|ranges|empty"):
        ask(batch)
    assert len(batch) == 0


def test_verdicts_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="'drop now' is no verdict"):
        encode_verdict("drop now")
