"""Tasks: coalesced per tenant, in turn, with a backoff of their own."""

from vcproxy.model.services import PortKey, Protocol
from vcproxy.model.timing import Timing
from vcproxy.node.pending import Pending, changed, removal

A, B = (PortKey("ns", name, "", Protocol.TCP) for name in "ab")


def names(pending: Pending, now: float) -> list[str]:
    taken = []
    while (task := pending.take(now)) is not None:
        taken.append(task[0])
    return taken


def test_changes_of_one_tenant_become_one_task() -> None:
    pending = Pending()
    pending.add("x", changed([A], 1.0, Timing(event=9)))
    pending.add("x", changed([B], 2.0, Timing(event=5)))
    taken = pending.take(3.0)
    assert taken is not None
    assert (taken[1].keys, taken[1].queued_at, taken[1].timing) == ({A, B}, 1.0, Timing(event=5))
    assert pending.take(3.0) is None


def test_everything_covers_keys() -> None:
    for order in ([changed(None, 1.0), changed([A], 2.0)], [changed([A], 1.0), changed(None, 2.0)]):
        pending = Pending()
        for task in order:
            pending.add("x", task)
        taken = pending.take(3.0)
        assert taken is not None
        assert (taken[1].everything, taken[1].keys) == (True, set())


def test_the_newer_of_removal_and_change_counts() -> None:
    pending = Pending()
    pending.add("x", changed([A], 1.0))
    pending.add("x", removal(2.0))
    taken = pending.take(3.0)
    assert taken is not None
    assert taken[1].remove
    pending.add("x", removal(4.0))
    pending.add("x", changed([A], 5.0))
    taken = pending.take(6.0)
    assert taken is not None
    assert (taken[1].remove, taken[1].everything) == (False, True)


def test_turns_are_taken_in_order() -> None:
    pending = Pending()
    for name in "xyz":
        pending.add(name, changed([A], 1.0))
    pending.add("x", changed([B], 2.0))
    first = pending.take(3.0)
    assert first is not None and first[0] == "x"
    pending.add("x", changed([A], 4.0))
    assert names(pending, 5.0) == ["y", "z", "x"]


def test_backoff_grows_to_its_limit_and_holds_newer_changes() -> None:
    pending = Pending(first_retry=1.0, longest_retry=3.0)
    pending.add("x", changed([A], 0.0))
    delays, now = [], 0.0
    for _ in range(4):
        taken = pending.take(now)
        assert taken is not None
        delays.append(pending.failed("x", taken[1], now))
        pending.add("x", changed([B], now))
        assert pending.take(now + delays[-1] - 0.1) is None
        assert pending.next_at() == now + delays[-1]
        now += delays[-1]
    assert delays == [1.0, 2.0, 3.0, 3.0]
    taken = pending.take(now)
    assert taken is not None
    assert (taken[1].keys, taken[1].queued_at) == ({A, B}, 0.0)


def test_a_change_that_came_during_the_failure_waits_with_it() -> None:
    pending = Pending(first_retry=1.0)
    pending.add("x", changed([A], 0.0))
    taken = pending.take(0.0)
    assert taken is not None
    pending.add("x", changed([B], 0.5))
    pending.failed("x", taken[1], 1.0)
    assert pending.take(1.5) is None
    assert [task.keys for _, task in pending.waiting()] == [{A, B}]


def test_what_is_scheduled_does_not_delay_what_is_due() -> None:
    pending = Pending()
    pending.schedule("x", changed([A], 0.0), 60.0)
    assert pending.next_at() == 60.0
    assert "x" not in pending
    pending.add("x", changed([B], 1.0))
    taken = pending.take(1.0)
    assert taken is not None and taken[1].keys == {B}
    taken = pending.take(60.0)
    assert taken is not None and taken[1].keys == {A}
    assert pending.next_at() is None


def test_a_discarded_name_has_nothing_to_do() -> None:
    pending = Pending()
    pending.add("x", changed([A], 0.0))
    pending.schedule("x", changed([A], 0.0), 1.0)
    pending.discard("x")
    assert names(pending, 5.0) == []
