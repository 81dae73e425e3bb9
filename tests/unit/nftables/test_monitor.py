"""Other people's changes are noticed, one's own are not."""

import contextlib
import select
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from vcproxy_nftables.elements import MapSpec
from vcproxy_nftables.monitor import SUSPEND_FROM, Changes, Monitor
from vcproxy_nftables.netlink import NetlinkError, Nfnetlink

pytestmark = pytest.mark.packets

Nft = Callable[[str], Any]

POOLS = MapSpec("pools", 4)
NOTHING = Changes(foreign=False, overflow=False, table_gone=False)
FOREIGN = Changes(foreign=True, overflow=False, table_gone=False)
PERHAPS = Changes(foreign=False, overflow=True, table_gone=False)


@pytest.fixture
def kernel(table: Nft) -> Iterator[Nfnetlink]:
    with contextlib.closing(Nfnetlink()) as netlink:
        yield netlink


@pytest.fixture
def monitor(kernel: Nfnetlink) -> Monitor:
    return kernel.monitor()


def readable(monitor: Monitor) -> bool:
    return bool(select.select([monitor.fileno()], [], [], 0)[0])


def add(netlink: Nfnetlink, count: int) -> None:
    batch = netlink.batch()
    batch.add(POOLS, np.arange(count, dtype="<u4").view(np.uint8).reshape(-1, 4))
    netlink.commit(batch)


@pytest.mark.parametrize("count", [1, SUSPEND_FROM - 1, SUSPEND_FROM, 50_000])
def test_own_changes_are_not_told(count: int, kernel: Nfnetlink, monitor: Monitor) -> None:
    add(kernel, count)
    assert not readable(monitor)
    assert monitor.drain() == NOTHING


@pytest.mark.parametrize(
    "commands",
    [
        "add element inet vcproxy pools { 0:7 }",
        "delete set inet vcproxy hairpin",
        "add set inet vcproxy more { type ipv4_addr; }",
        "add chain inet vcproxy more",
        "add rule inet vcproxy one drop",
        "flush set inet vcproxy pools\nadd element inet vcproxy pools { 0:7 }",
        "add table inet vcproxy { flags dormant; }",
    ],
)
def test_changes_of_others_to_the_table_are_told_once(commands: str, table: Nft, monitor: Monitor) -> None:
    table(commands)
    assert readable(monitor)
    assert monitor.drain() == FOREIGN
    assert not readable(monitor)
    assert monitor.drain() == NOTHING


@pytest.mark.parametrize(
    "commands",
    [
        "add table ip vcproxy",  # the same name in another family is another table
        "add table inet vcproxy2",
        "add table inet other\nadd set inet other pools { type mark; }\nadd element inet other pools { 7 }",
        "",
    ],
)
def test_changes_of_others_to_other_tables_are_not_told(commands: str, table: Nft, monitor: Monitor) -> None:
    table(commands)
    assert not monitor.drain()


@pytest.mark.parametrize("commands", ["delete table inet vcproxy", "flush ruleset"])
def test_the_deletion_of_the_table_is_told(commands: str, table: Nft, monitor: Monitor) -> None:
    table(commands)
    assert monitor.drain() == Changes(foreign=True, overflow=False, table_gone=True)


def test_another_commit_socket_of_the_same_process_is_somebody_else(kernel: Nfnetlink, monitor: Monitor) -> None:
    with contextlib.closing(Nfnetlink()) as other:
        add(other, 1)
    assert monitor.drain() == FOREIGN


def test_what_others_change_during_an_own_load_is_told_as_perhaps(
    table: Nft, kernel: Nfnetlink, monitor: Monitor
) -> None:
    with monitor.suspended(kernel.generation), contextlib.closing(Nfnetlink()) as other:
        add(kernel, 1)
        add(other, 2)
    assert readable(monitor)
    assert monitor.drain() == PERHAPS
    assert not readable(monitor)
    table("add element inet vcproxy pools { 0:7 }")
    assert monitor.drain() == FOREIGN


def test_an_own_load_that_fails_is_no_change(kernel: Nfnetlink, monitor: Monitor) -> None:
    batch = kernel.batch()
    batch.remove(POOLS, np.arange(2 * SUSPEND_FROM, dtype="<u4").view(np.uint8).reshape(-1, 4))
    with pytest.raises(NetlinkError):
        kernel.commit(batch)
    assert monitor.drain() == NOTHING


def test_more_changes_than_can_be_queued_are_told_as_perhaps(table: Nft) -> None:
    with contextlib.closing(Nfnetlink()) as kernel, contextlib.closing(Nfnetlink()) as other:
        monitor = kernel.monitor(receive_buffer=1)
        add(other, 5_000)
        assert monitor.drain().overflow
        table("add element inet vcproxy pools { 9:9 }")
        assert monitor.drain() == FOREIGN


def test_a_closed_one_has_no_descriptor(kernel: Nfnetlink, monitor: Monitor) -> None:
    assert kernel.monitor() is monitor
    kernel.close()
    assert monitor.fileno() == -1
