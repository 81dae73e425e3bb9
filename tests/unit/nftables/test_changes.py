"""Net changes and the order of transactions."""

from tests.fakes.nftables import FakeBatch, FakeTable
from vcproxy.model.services import Protocol
from vcproxy_nftables.changes import Changes
from vcproxy_nftables.specs import FAMILY, PORT, number

FRONTENDS = PORT[Protocol.TCP, 4].frontends
ENDPOINTS = FAMILY[4].endpoints


def frontend(index: int) -> bytes:
    return bytes(8) + index.to_bytes(4, "big")


def target(index: int) -> bytes:
    return bytes((10, 0, index >> 8, index & 255, 0, 80))


def loaded(count: int, slots: int) -> Changes:
    changes = Changes()
    for index in range(count):
        changes.set_pool(4, index, b"", b"".join(target(slot) for slot in range(slots)))
        changes.set(FRONTENDS, frontend(index), None, number(index))
    return changes


def test_what_ends_as_it_began_costs_nothing() -> None:
    changes = Changes()
    changes.set(FRONTENDS, frontend(1), b"aaaa", None)
    changes.set(FRONTENDS, frontend(1), None, b"bbbb")
    changes.set(FRONTENDS, frontend(1), b"bbbb", b"aaaa")
    changes.set_pool(4, 1, target(1), b"")
    changes.set_pool(4, 1, b"", target(1))
    assert changes.transactions(FakeBatch) == []  # type: ignore[arg-type]


def test_an_update_is_one_transaction() -> None:
    assert len(FakeTable().commit(loaded(10, 5))) == 1


def test_a_large_load_is_cut_and_targets_come_before_the_frontends_that_expose_them() -> None:
    table = FakeTable()
    batches = table.commit(loaded(20, 10), limit=50)
    assert [len(batch) for batch in batches] == [50, 50, 50, 50, 20]
    specs = [spec for batch in batches for _, spec, *_ in batch.operations]
    assert specs == [ENDPOINTS] * 200 + [FRONTENDS] * 20
    assert table.maps[ENDPOINTS][number(7) + number(9)] == (target(9) + b"\0\0", "", "")


def test_on_removal_frontends_go_first() -> None:
    table = FakeTable()
    table.commit(loaded(20, 10))
    changes = Changes()
    for index in range(20):
        changes.set_pool(4, index, b"".join(target(slot) for slot in range(10)), b"")
        changes.set(FRONTENDS, frontend(index), number(index), None)
    operations = [operation for batch in table.commit(changes, limit=50) for operation in batch.operations]
    assert [spec for _, spec, *_ in operations] == [FRONTENDS] * 20 + [ENDPOINTS] * 200
    assert not table.maps[ENDPOINTS]


def test_a_replaced_value_never_falls_between_two_transactions() -> None:
    table = FakeTable()
    table.commit(loaded(31, 1))
    changes = Changes()
    for index in range(31):
        changes.set(FRONTENDS, frontend(index), number(index), number(index + 1000))
    for batch in table.commit(changes, limit=7):
        removed = {key for verb, _, key, *_ in batch.operations if verb == "remove"}
        assert removed == {key for verb, _, key, *_ in batch.operations if verb == "add"}
