"""Transactions: done wholly or not at all, and each refusal says what was refused."""

import contextlib
import errno
import ipaddress
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vcproxy_nftables import wire
from vcproxy_nftables.batch import Batch
from vcproxy_nftables.dumps import repeats
from vcproxy_nftables.elements import MapSpec
from vcproxy_nftables.netlink import (
    DumpInterrupted,
    GenerationChanged,
    NetlinkError,
    Nfnetlink,
    OutcomeUnknown,
    SetFacts,
    TableMissing,
)

pytestmark = pytest.mark.packets

Nft = Callable[[str], Any]
Matrix = npt.NDArray[np.uint8]

ENDPOINTS = MapSpec("endpoints", 8, 8)
POOLS = MapSpec("pools", 4)
SMALL = MapSpec("small", 4)
BALANCE = MapSpec("balance", 4, verdict=True)
ABSENT = MapSpec("absent", 4)


@pytest.fixture
def kernel(table: Nft) -> Iterator[Nfnetlink]:
    with contextlib.closing(Nfnetlink()) as netlink:
        yield netlink


def numbered(count: int, *, start: int = 0) -> tuple[Matrix, Matrix]:
    """Keys and data of so many endpoints, all different."""
    keys = np.zeros((count, 8), np.uint8)
    keys[:, :4] = np.arange(start, start + count, dtype="<u4").view(np.uint8).reshape(-1, 4)
    data = np.zeros((count, 8), np.uint8)
    data[:, :4] = np.arange(count, dtype=">u4").view(np.uint8).reshape(-1, 4)
    data[:, 5] = 80
    return keys, data


def one(netlink: Nfnetlink, key: bytes = bytes(4)) -> Batch:
    batch = netlink.batch()
    batch.add(POOLS, key)
    return batch


def test_100000_elements_are_read_back_as_written(kernel: Nfnetlink) -> None:
    keys, data = numbered(100_000)
    batch = kernel.batch()
    batch.add(ENDPOINTS, keys, data)
    assert len(batch) == 100_000
    kernel.commit(batch)
    found = kernel.dump(ENDPOINTS)
    order = np.argsort(np.ascontiguousarray(found.keys[:, :4]).view("<u4").reshape(-1))
    assert (found.keys[order] == keys).all()
    assert (found.data[order] == data).all()

    batch = kernel.batch()
    batch.remove(ENDPOINTS, keys)
    kernel.commit(batch)
    assert len(kernel.dump(ENDPOINTS).keys) == 0


@pytest.mark.parametrize("count", [1, 499, 500, 501, 20_000])
def test_elements_are_found_by_their_keys(count: int, kernel: Nfnetlink) -> None:
    keys, data = numbered(20_000)
    batch = kernel.batch()
    batch.add(ENDPOINTS, keys, data)
    kernel.commit(batch)
    asked = np.random.default_rng(1).permutation(len(keys))[:count]
    found = kernel.get(ENDPOINTS, keys[asked])
    assert found is not None
    assert (found.keys == keys[asked]).all()
    assert (found.data == data[asked]).all()
    none = kernel.get(ENDPOINTS, keys[:0])
    assert none is not None
    assert len(none.keys) == 0


@pytest.mark.parametrize("missing", [0, 499, 500, 999])
def test_a_key_that_is_not_there_is_told(missing: int, kernel: Nfnetlink) -> None:
    keys, data = numbered(1000)
    batch = kernel.batch()
    batch.add(ENDPOINTS, np.delete(keys, missing, 0), np.delete(data, missing, 0))
    kernel.commit(batch)
    assert kernel.get(ENDPOINTS, keys) is None
    assert kernel.get(ENDPOINTS, np.delete(keys, missing, 0)) is not None  # nothing of the first answer is left


def test_asking_for_keys_of_a_missing_table_is_an_error(table: Nft, kernel: Nfnetlink) -> None:
    keys, _ = numbered(1)
    assert kernel.get(ABSENT, keys[:, :4]) is None
    table("delete table inet vcproxy")
    with pytest.raises(TableMissing):
        kernel.get(ENDPOINTS, keys)


def test_nothing_is_done_for_an_empty_batch(kernel: Nfnetlink) -> None:
    before = kernel.generation()
    kernel.commit(kernel.batch())
    assert kernel.generation() == before


def test_each_transaction_makes_one_generation(kernel: Nfnetlink) -> None:
    before = kernel.generation()
    kernel.commit(one(kernel))
    assert kernel.generation() == before + 1


def test_sets_are_told_with_the_lengths_the_kernel_uses(kernel: Nfnetlink) -> None:
    sets = kernel.sets()
    assert sets["endpoints"][:3] == (8, 8, 0x8)
    assert sets["nodeports"][:2] == (2, 4)
    assert sets["pools"][:3] == (4, 0, 0)
    told = sets["pools"].elements
    assert told in (0, None)  # None: a kernel before NFTA_SET_COUNT
    kernel.commit(one(kernel))
    assert kernel.sets()["pools"] == SetFacts(4, 0, 0, None if told is None else 1)
    assert {"frontends", "affinity", "balance", "ranges"} <= sets.keys()


def test_a_missing_table_is_told_as_such(table: Nft, kernel: Nfnetlink) -> None:
    assert kernel.exists()
    table("delete table inet vcproxy")
    assert not kernel.exists()
    assert kernel.sets() == {}
    with pytest.raises(TableMissing, match="vcproxy is gone") as caught:
        kernel.commit(one(kernel))
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(TableMissing):
        kernel.dump(POOLS)
    many = kernel.batch()
    many.add(ENDPOINTS, *numbered(10_000))
    with pytest.raises(TableMissing):
        kernel.commit(many)


def test_a_missing_map_is_not_a_missing_table(kernel: Nfnetlink) -> None:
    batch = one(kernel)
    batch.add(ABSENT, bytes(4))
    with pytest.raises(NetlinkError, match=r"absent.*ENOENT") as caught:
        kernel.commit(batch)
    assert not isinstance(caught.value, TableMissing)
    assert caught.value.name == "absent"
    with pytest.raises(NetlinkError, match="cannot read absent"):
        kernel.dump(ABSENT)


@pytest.mark.parametrize("count", [1, 5_000])
def test_removing_what_is_not_there_names_the_key_and_does_nothing(count: int, kernel: Nfnetlink) -> None:
    keys, data = numbered(count)
    batch = kernel.batch()
    batch.add(ENDPOINTS, keys[:-1], data[:-1])
    kernel.commit(batch)
    batch = one(kernel)
    batch.remove(ENDPOINTS, keys)
    with pytest.raises(NetlinkError, match="ENOENT") as caught:
        kernel.commit(batch)
    assert (caught.value.name, caught.value.key) == ("endpoints", keys[-1].tobytes())
    assert len(kernel.dump(ENDPOINTS).keys) == count - 1
    assert len(kernel.dump(POOLS).keys) == 0


def test_adding_what_is_there_is_an_error_only_if_it_must_be_new(kernel: Nfnetlink) -> None:
    keys, data = numbered(3_000)
    batch = kernel.batch()
    batch.add(ENDPOINTS, keys[2_500:2_501], data[2_500:2_501])
    kernel.commit(batch)
    again = kernel.batch()
    again.add(ENDPOINTS, keys, data)
    kernel.commit(again)
    exclusive = kernel.batch()
    exclusive.add(ENDPOINTS, keys[2_500:2_501], data[2_500:2_501], exclusive=True)
    with pytest.raises(NetlinkError, match="EEXIST") as caught:
        kernel.commit(exclusive)
    assert caught.value.key == keys[2_500].tobytes()


def test_adding_a_key_with_other_data_is_refused_and_replacing_is_not(kernel: Nfnetlink) -> None:
    keys, data = numbered(10)
    batch = kernel.batch()
    batch.add(ENDPOINTS, keys, data)
    kernel.commit(batch)
    other = kernel.batch()
    other.add(ENDPOINTS, keys, data[::-1].copy())
    with pytest.raises(NetlinkError) as caught:
        kernel.commit(other)
    assert caught.value.errno in (errno.EEXIST, errno.EBUSY)  # by kernel version
    assert caught.value.key == keys[0].tobytes()
    replaced = kernel.batch()
    replaced.replace(ENDPOINTS, keys, data[::-1].copy())
    kernel.commit(replaced)
    found = kernel.dump(ENDPOINTS)
    meant = dict(zip(keys[:, 0].tolist(), data[::-1, 3].tolist(), strict=True))
    assert dict(zip(found.keys[:, 0].tolist(), found.data[:, 3].tolist(), strict=True)) == meant


def test_a_full_map_says_so(kernel: Nfnetlink) -> None:
    batch = kernel.batch()
    batch.add(SMALL, bytes(range(40)))
    with pytest.raises(NetlinkError, match=r"ENFILE.*raise its size"):
        kernel.commit(batch)
    assert len(kernel.dump(SMALL).keys) == 0


def test_a_verdict_needs_its_chain(kernel: Nfnetlink) -> None:
    batch = kernel.batch()
    batch.add(BALANCE, bytes(4), verdicts=["goto nowhere"])
    with pytest.raises(NetlinkError, match=r"balance.*ENOENT") as caught:
        kernel.commit(batch)
    assert not isinstance(caught.value, TableMissing)


def test_a_map_of_another_shape_is_refused(kernel: Nfnetlink) -> None:
    batch = kernel.batch()
    batch.add(POOLS._replace(key_octets=8), bytes(8))
    with pytest.raises(NetlinkError, match=r"pools.*EINVAL"):
        kernel.commit(batch)
    kernel.commit(one(kernel))
    with pytest.raises(ValueError, match="keys and data have 4 and no octets"):
        kernel.dump(POOLS._replace(key_octets=8))


class RemovingAMapInUse(Batch):
    """Asks for something that the kernel answers with EBUSY; element operations no longer do since Linux 5.17."""

    def message(self, generation: int | None = None) -> bytes:
        whole = super().message(generation)
        begin, end = whole[:20], whole[-20:]
        payload = wire.text(1, self.table) + wire.text(2, BALANCE.name)
        delete = wire.message(kind=10 << 8 | 11, flags=wire.NLM_F_ACK, sequence=1, family=self.family, payload=payload)
        return begin + delete + end


def test_ebusy_is_raised(kernel: Nfnetlink) -> None:
    batch = RemovingAMapInUse()
    batch.add(POOLS, bytes(4))
    with pytest.raises(NetlinkError, match="EBUSY"):
        kernel.commit(batch)


def test_a_lost_answer_is_told_as_unknown_and_the_next_commit_works(table: Nft) -> None:
    with contextlib.closing(Nfnetlink(receive_buffer=1)) as netlink:  # the kernel makes it 2,304 octets
        # Answers that nobody reads fill the queue, and the commit's own answer is lost.
        ask = wire.message(kind=10 << 8 | 16, flags=0, sequence=1 << 30, family=1)
        channel = netlink._commits
        for _ in range(20):
            channel._socket.send(ask)
        with pytest.raises(OutcomeUnknown, match="was lost") as caught:
            netlink.commit(one(netlink))
        assert caught.value.errno == errno.ENOBUFS
        assert len(netlink.dump(POOLS).keys) == 1  # here it was done
        netlink.commit(one(netlink, b"next"))
        assert len(netlink.dump(POOLS).keys) == 2


def test_more_errors_than_the_queue_holds_are_still_errors(table: Nft) -> None:
    with contextlib.closing(Nfnetlink(receive_buffer=1)) as netlink:
        batch = netlink.batch()
        for key in numbered(200)[0]:
            batch.remove(ENDPOINTS, key.tobytes())
        with pytest.raises(NetlinkError, match="ENOENT") as caught:
            netlink.commit(batch)
        assert caught.value.key == numbered(1)[0].tobytes()
        netlink.commit(one(netlink))


def test_a_commit_for_another_generation_is_refused(kernel: Nfnetlink) -> None:
    seen = kernel.generation()
    kernel.commit(one(kernel), generation=seen)
    with pytest.raises(GenerationChanged):
        kernel.commit(one(kernel, b"more"), generation=seen)
    assert len(kernel.dump(POOLS).keys) == 1


@pytest.mark.parametrize("code", [errno.EINTR, errno.EAGAIN])
def test_what_the_kernel_asks_to_repeat_is_repeated(
    code: int, kernel: Nfnetlink, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Neither can be had at will: EINTR wants a fatal signal in the middle, EAGAIN a module to be loaded.
    real = kernel._commits.transact
    refusals = [code, code]

    def transact(data: bytes) -> tuple[list[wire.Answer], bool]:
        if refusals:
            return [wire.Answer(0, refusals.pop(), -1, "")], False
        return real(data)

    monkeypatch.setattr(kernel._commits, "transact", transact)
    kernel.commit(one(kernel))
    assert len(kernel.dump(POOLS).keys) == 1


@pytest.mark.parametrize("reader", ["dump", "get"])
def test_a_read_begins_behind_the_end_of_a_transaction_that_counts_already(
    reader: str, kernel: Nfnetlink, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A transaction is counted before its last elements are moved; one that is there just now is put behind each count.
    kernel.commit(one(kernel))
    generation, transact = kernel.generation, kernel._commits.transact
    collect = {"dump": kernel._questions.dump, "get": kernel._questions.collect}[reader]
    ending = False
    reads = []

    def counted() -> int:
        nonlocal ending
        ending = True
        return generation()

    def waited(data: bytes) -> tuple[list[wire.Answer], bool]:
        nonlocal ending
        ending = False
        return transact(data)

    def read(**asked: Any) -> Any:
        reads.append(ending)
        return collect(**asked)

    monkeypatch.setattr(kernel, "generation", counted)
    monkeypatch.setattr(kernel._commits, "transact", waited)
    monkeypatch.setattr(kernel._questions, "dump" if reader == "dump" else "collect", read)
    found = kernel.dump(POOLS) if reader == "dump" else kernel.get(POOLS, np.zeros((1, 4), np.uint8))
    assert found is not None
    assert len(found.keys) == 1
    assert reads == [False]


def test_a_dump_is_of_one_generation_while_others_commit(kernel: Nfnetlink) -> None:
    # Each transaction gives all of 5,000 elements one other value, so a torn dump would show two.
    keys, data = numbered(5_000)
    batch = kernel.batch()
    batch.add(ENDPOINTS, keys, np.zeros_like(data))
    kernel.commit(batch)
    failures: list[Exception] = []

    def change() -> None:
        with contextlib.closing(other):
            for value in range(1, 30):
                changed = other.batch()
                changed.replace(ENDPOINTS, keys, np.full_like(data, value))
                try:
                    other.commit(changed)
                except NetlinkError as error:
                    failures.append(error)

    other = Nfnetlink()
    changer = threading.Thread(target=change)
    changer.start()
    while changer.is_alive():
        with contextlib.suppress(DumpInterrupted):
            found = kernel.dump(ENDPOINTS)
            assert len(found.keys) == 5_000
            assert len(np.unique(found.data)) == 1
    changer.join()
    assert failures == []
    assert (kernel.dump(ENDPOINTS).data == 29).all()


@pytest.mark.parametrize("width", [2, 4, 8, 12, 24, 36])
def test_repeated_keys_are_found(width: int) -> None:
    keys = np.zeros((1000, width), np.uint8)
    keys[:, -2:] = np.arange(1000, dtype="<u2").view(np.uint8).reshape(-1, 2)
    assert not repeats(keys)
    keys[900] = keys[7]
    assert repeats(keys)


def test_it_works_from_any_thread_in_the_namespace_it_was_opened_in(kernel: Nfnetlink) -> None:
    def add(number: int) -> None:
        for step in range(20):
            kernel.commit(one(kernel, struct.pack("=I", number * 100 + step)))
            kernel.dump(POOLS)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kernel.dump(POOLS).keys) == 80


def test_another_table_of_another_family(table: Nft) -> None:
    table("add table ip other\nadd set ip other pools { type ipv4_addr; }")
    address = ipaddress.ip_address("192.0.2.1").packed
    with contextlib.closing(Nfnetlink(table="other", family=2)) as netlink:
        netlink.commit(one(netlink, address))
        assert netlink.dump(POOLS).keys.tobytes() == address


def test_a_closed_one_has_no_descriptor(table: Nft) -> None:
    netlink = Nfnetlink()
    assert netlink.fileno() >= 0
    netlink.monitor()
    netlink.close()
    netlink.close()
    assert netlink.fileno() == -1
