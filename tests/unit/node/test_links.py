"""Devices and addresses through rtnetlink: the parser, and the real thing in a network namespace of the test's own."""

import asyncio
import ctypes
import errno
import os
import socket
import struct
import subprocess
import uuid
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vcproxy.model.addresses import parse_address
from vcproxy.node import links
from vcproxy.node.links import DELADDR, DELLINK, NEWADDR, NEWLINK, LinkMonitor, Links, Message, messages


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def link(index: int, name: str, kind: int = NEWLINK, family: int = socket.AF_UNSPEC) -> Message:
    body = (
        struct.pack("=BxHiII", family, 1, index, 0, 0) + attribute(4, b"\0\0\0\0") + attribute(3, name.encode() + b"\0")
    )
    return Message(kind, 0, body)


def address(index: int, text: str, kind: int = NEWADDR, peer: str | None = None) -> Message:
    packed = parse_address(text)
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    attributes = attribute(1, parse_address(peer) if peer else packed) + (attribute(2, packed) if peer else b"")
    return Message(kind, 0, struct.pack("=BBBBI", family, 24, 0, 0, index) + attributes)


def after(*told: Message) -> Links:
    state = Links()
    for message in told:
        state.note(message)
    return state


@pytest.mark.parametrize(
    ("told", "names"),
    [
        ([link(1, "lo"), link(2, "vx-acme")], {"lo", "vx-acme"}),
        ([link(2, "vx-acme"), link(2, "renamed")], {"renamed"}),
        ([link(2, "vx-acme"), link(2, "vx-acme", DELLINK)], set()),
        ([link(2, "vx-acme"), link(2, "vx-acme", DELLINK, socket.AF_BRIDGE)], {"vx-acme"}),
        ([link(2, "a"), link(3, "b"), link(2, "c"), link(3, "a")], {"a", "c"}),
        ([Message(99, 0, b"")], set()),
    ],
    ids=["new", "renamed", "deleted", "left its bridge", "names swapped", "other messages"],
)
def test_links(told: list[Message], names: set[str]) -> None:
    assert after(*told).names == names


def test_addresses_are_the_local_ones_and_go_with_their_device() -> None:
    state = after(link(2, "a"), address(2, "10.0.0.1"), address(2, "10.9.0.1", peer="10.9.0.2"), address(3, "fd00::1"))
    assert state.addresses == {parse_address(text) for text in ("10.0.0.1", "10.9.0.1", "fd00::1")}
    state.note(address(2, "10.0.0.1", DELADDR))
    assert parse_address("10.0.0.1") not in state.addresses
    state.note(link(2, "a", DELLINK))
    assert state.addresses == {parse_address("fd00::1")}


def test_a_datagram_may_hold_several_messages_and_rubbish() -> None:
    def framed(message: Message) -> bytes:
        return struct.pack("=IHHII", 16 + len(message.body), message.type, 0, 0, 0) + message.body

    datagram = framed(link(1, "lo")) + framed(link(2, "x"))
    assert [message.type for message in messages(datagram)] == [NEWLINK, NEWLINK]
    assert list(messages(datagram[:10])) == []
    assert list(messages(bytes(40))) == []


@pytest.fixture
def namespace() -> Iterator[str]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    name = f"vcp-links-{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def ip(namespace: str, *arguments: str) -> None:
    subprocess.run(["ip", "-n", namespace, *arguments], check=True)


def batch(namespace: str, script: str) -> None:
    subprocess.run(["ip", "-n", namespace, "-batch", "-"], input=script.encode(), check=True)


class Seen:
    def __init__(self) -> None:
        self.names: frozenset[str] = frozenset()
        self.addresses: frozenset[bytes] = frozenset()
        self.calls = 0

    def __call__(self, names: frozenset[str], addresses: frozenset[bytes]) -> None:
        self.names, self.addresses = names, addresses
        self.calls += 1

    async def until(self, names: set[str]) -> None:
        async with asyncio.timeout(10):
            while self.names != names:  # noqa: ASYNC110 - told by a callback
                await asyncio.sleep(0.005)


def in_namespace(namespace: str, body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine function on a loop in a thread that has entered the namespace."""

    def run() -> None:
        with Path(f"/run/netns/{namespace}").open() as handle:
            if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), 0x40000000):
                raise OSError(ctypes.get_errno(), "setns")
        asyncio.run(body())

    with ThreadPoolExecutor(1) as executor:  # the thread ends, and with it its stay in the namespace
        executor.submit(run).result(60)


@pytest.mark.packets
def test_devices_are_followed_as_they_come_go_and_change_names(namespace: str) -> None:
    ip(namespace, "link", "add", "br-acme", "type", "bridge")

    async def body() -> None:
        seen = Seen()
        with LinkMonitor(seen):
            assert seen.names == {"lo", "br-acme"}
            ip(namespace, "link", "add", "va", "type", "veth", "peer", "vb")
            await seen.until({"lo", "br-acme", "va", "vb"})
            ip(namespace, "link", "set", "va", "master", "br-acme")
            ip(namespace, "link", "set", "va", "nomaster")
            ip(namespace, "link", "set", "va", "name", "vx-acme")
            await seen.until({"lo", "br-acme", "vx-acme", "vb"})
            ip(namespace, "addr", "add", "10.7.0.1/24", "dev", "vb")
            async with asyncio.timeout(10):
                while parse_address("10.7.0.1") not in seen.addresses:  # noqa: ASYNC110 - told by a callback
                    await asyncio.sleep(0.005)
            ip(namespace, "link", "delete", "vb")
            await seen.until({"lo", "br-acme"})
            assert parse_address("10.7.0.1") not in seen.addresses

    in_namespace(namespace, body)


@pytest.mark.packets
def test_an_overrun_is_made_good_by_listing_anew(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "RECEIVE_BUFFER", 1)  # the kernel makes it its smallest

    async def body() -> None:
        seen = Seen()
        relists = []
        with LinkMonitor(seen) as monitor:
            relist = monitor._relist
            monkeypatch.setattr(monitor, "_relist", lambda: (relists.append(1), relist()))
            script = "".join(f"link add d{at} type bridge\n" for at in range(40)) + "".join(
                f"link delete d{at}\n" for at in range(39)
            )
            batch(namespace, script)  # blocks the loop, so that nothing is read meanwhile
            await seen.until({"lo", "d39"})
            assert relists, "the buffer was meant to overrun"

    in_namespace(namespace, body)


@pytest.mark.packets
def test_a_listing_that_fails_is_tried_again(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "RELIST_AFTER_ERROR", 0.01)

    async def body() -> None:
        seen, listing, faults = Seen(), links.listing, [OSError(errno.ENOBUFS, "busy")]

        def faulty() -> Links:
            if faults:
                raise faults.pop()
            return listing()

        with LinkMonitor(seen) as monitor:
            ip(namespace, "link", "add", "br-acme", "type", "bridge")
            monkeypatch.setattr(links, "listing", faulty)
            monitor._links = Links()
            monitor._relist()
            await seen.until({"lo", "br-acme"})
            assert faults == []

    in_namespace(namespace, body)
