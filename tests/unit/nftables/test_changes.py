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


def test_what_only_the_old_way_needs_goes_right_behind_a_frontend_that_is_led_elsewhere() -> None:
    """As externalTrafficPolicy does that becomes Local: other pool for the outside, no masquerade any more."""
    public, outside, masquerade = (
        PORT[Protocol.TCP, 4].nodeports,
        PORT[Protocol.TCP, 4].nodeports_outside,
        PORT[Protocol.TCP, 4].nodeports_masquerade,
    )
    key, table, changes = b"\x75\x80", FakeTable(), Changes()
    changes.set(public, key, None, number(7) + b"super")
    changes.set(masquerade, key, None, b"")
    changes.set_pool(4, 7, b"", target(1))
    table.commit(changes)
    changes = Changes()
    changes.set(public, key, number(7) + b"super", number(8) + b"super")
    changes.set(outside, key, None, number(9))
    changes.set(masquerade, key, b"", None)
    changes.set_pool(4, 7, target(1), b"")
    changes.set_pool(4, 8, b"", target(1) + target(2))
    changes.set_pool(4, 9, b"", target(2))
    first, second = ({(verb, spec) for verb, spec, *_ in batch.operations} for batch in table.commit(changes))
    assert first == {("add", ENDPOINTS), ("remove", public), ("add", public), ("add", outside)}
    assert second == {("remove", masquerade), ("remove", ENDPOINTS)}


def test_a_service_that_goes_goes_in_one_transaction() -> None:
    table = FakeTable()
    table.commit(loaded(1, 3))
    changes = Changes()
    changes.set(FRONTENDS, frontend(0), number(0), None)
    changes.set_pool(4, 0, b"".join(target(slot) for slot in range(3)), b"")
    assert len(table.commit(changes)) == 1
