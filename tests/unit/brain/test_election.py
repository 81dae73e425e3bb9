"""The election of shards: each decision, and a simulation of brains, an API server and a network that fail at random."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcproxy.brain.election import Act, Election, Key, Lease, Step, Timing, shard_of

TIMING = Timing(lease=15, renew=10.0, retry=2.0)
TIMEOUT = TIMING.renew / 2
CALM_ROUND = 1.0 + 1.2 * TIMING.retry


class Refused(Exception):
    """The condition of a write does not hold."""


class Server:
    """Leases with versions; writes are conditional, lists are consistent."""

    def __init__(self) -> None:
        self.leases: dict[Key, Lease] = {}
        self._versions = itertools.count(1)

    def list(self) -> list[Lease]:
        return list(self.leases.values())

    def do(self, me: str, step: Step) -> Lease | None:
        now = self.leases.get(step.key)
        if (now.version if now else None) != (step.before.version if step.before else None):
            raise Refused
        if step.act is Act.REMOVE:
            del self.leases[step.key]
            return None
        holder, seconds = (me, float(TIMING.lease)) if step.act is Act.HOLD else ("", 1.0)
        self.leases[step.key] = made = Lease(step.key, holder, str(next(self._versions)), seconds)
        return made


class One:
    """A brain whose requests are answered at once."""

    def __init__(self, server: Server, name: str, shards: int) -> None:
        self.name = name
        self.server = server
        self.election = Election(name, shards, TIMING)

    def round(self, now: float) -> list[Step]:
        self.election.listed(self.server.list(), now)
        steps = self.election.plan(now)
        self.do(steps, now)
        return steps

    def do(self, steps: Iterable[Step], now: float) -> None:
        for step in steps:
            try:
                after = self.server.do(self.name, step)
            except Refused:
                continue
            self.election.written(step, after, sent=now, now=now)


def test_a_new_brain_first_says_that_it_is_there() -> None:
    one = One(Server(), "a", 4)
    assert [(step.act, step.key) for step in one.round(0)] == [(Act.HOLD, "a")]
    assert not one.election.held(0)
    one.round(2)
    assert one.election.held(2) == {0, 1, 2, 3} == one.election.kept()
    assert one.election.holders(2) == dict.fromkeys(range(4), "a")


@pytest.mark.parametrize(("shards", "brains"), [(16, 3), (16, 5), (4, 4), (3, 5), (1, 2), (64, 7)])
def test_brains_that_start_together_share_evenly_at_once(shards: int, brains: int) -> None:
    server = Server()
    all_of_them = [One(server, f"brain-{number}", shards) for number in range(brains)]
    for now in (0, 2, 4):
        for one in all_of_them:
            one.round(now)
    held = [one.election.held(4) for one in all_of_them]
    assert sorted(shard for some in held for shard in some) == list(range(shards))
    assert max(map(len, held)) - min(map(len, held)) <= 1


def test_a_brain_that_joins_gets_its_share_from_those_that_have_more_and_nothing_else_moves() -> None:
    server = Server()
    first, second = One(server, "a", 8), One(server, "b", 8)
    for now in (0, 2):
        first.round(now)
        second.round(now)
    third = One(server, "c", 8)
    before = {one.name: one.election.held(2) for one in (first, second)}
    for now in (4, 6, 8, 10):
        for one in (first, second, third):
            one.round(now)
    assert sorted(len(one.election.held(10)) for one in (first, second, third)) == [2, 3, 3]
    for one in (first, second):
        assert one.election.held(10) < before[one.name]


def test_what_is_given_back_is_not_held_before_others_can_have_it() -> None:
    server = Server()
    first, second = One(server, "a", 8), One(server, "b", 8)
    first.round(0)
    first.round(2)
    second.round(3)
    first.election.listed(server.list(), 4)
    steps = first.election.plan(4)
    given = {step.key for step in steps if step.act is Act.RELEASE}
    assert len(given) == 2, "half of the surplus of four"
    assert first.election.held(4) == set(range(8)) - given == first.election.kept()


def test_a_holder_gives_up_before_another_takes() -> None:
    """Its clock begins when it sends, the other's when the list is there."""
    server = Server()
    first, second = One(server, "a", 1), One(server, "b", 1)
    first.round(0)
    first.round(2)
    second.round(3)
    for now in (5, 12, 17.9):
        second.round(now)
        assert not second.election.held(now)
    assert first.election.held(11.9)
    assert first.election.next_expiry(11.9) == 12
    assert not first.election.held(12)
    assert first.election.kept() == {0}, "nobody is known to have it"
    second.round(18)
    assert second.election.held(18) == {0}
    first.round(19)
    assert not first.election.kept()


def test_an_unanswered_take_is_found_in_the_next_list() -> None:
    server = Server()
    one = One(server, "a", 1)
    one.round(0)
    one.election.listed(server.list(), 2)
    for step in one.election.plan(2):
        server.do("a", step)  # and no answer comes
    assert not one.election.held(3)
    one.round(4)
    assert one.election.held(4) == {0}


def test_an_unanswered_release_is_repeated_or_taken_back() -> None:
    server = Server()
    first, second = One(server, "a", 2), One(server, "b", 2)
    first.round(0)
    first.round(2)
    second.round(3)
    first.election.listed(server.list(), 4)
    (lost,) = (step.key for step in first.election.plan(4) if step.act is Act.RELEASE)
    first.election.listed(server.list(), 6)
    assert [step.key for step in first.election.plan(6) if step.act is Act.RELEASE] == [lost]
    second.do(second.election.leave(), 7)
    first.round(8)
    assert first.election.held(8) == {0, 1}


def test_who_leaves_gives_all_back_and_is_not_waited_for() -> None:
    server = Server()
    first, second = One(server, "a", 4), One(server, "b", 4)
    for now in (0, 2):
        first.round(now)
        second.round(now)
    first.do(first.election.leave(), 3)
    assert not first.election.held(3)
    second.round(4)
    assert second.election.held(4) == {0, 1, 2, 3}
    assert second.election.members(4) == {"b"}
    assert "a" not in server.leases


def test_a_brain_that_died_is_forgotten() -> None:
    server = Server()
    first, second = One(server, "a", 2), One(server, "b", 2)
    for now in (0, 2):
        first.round(now)
        second.round(now)
    for now in (4, 10, 17, 19):
        second.round(now)
    assert second.election.held(19) == {0, 1}
    assert "a" not in server.leases


def test_a_lease_that_somebody_deleted_is_not_believed_in() -> None:
    server = Server()
    one = One(server, "a", 2)
    one.round(0)
    one.round(2)
    del server.leases[1]
    one.election.listed(server.list(), 4)
    assert one.election.held(4) == {0}
    one.do(one.election.plan(4), 4)
    assert one.election.held(4) == {0, 1}


def test_shards_of_tenants_never_change() -> None:
    assert [shard_of(uid, 16) for uid in ("super", "dir-acme", "dir-globex", "")] == SHARDS
    spread = Counter(shard_of(f"tenant-{number}", 16) for number in range(5000))
    assert len(spread) == 16
    assert max(spread.values()) < 2 * min(spread.values())


SHARDS = [9, 15, 15, 4]


class Simulated:
    """One brain of the simulation. `frozen_until`: what happens to it meanwhile happens then."""

    def __init__(self, name: str, shards: int) -> None:
        self.name = name
        self.election = Election(name, shards, TIMING)
        self.alive = True
        self.frozen_until = 0.0
        self.cut_off_until = 0.0
        self.round = 0


class Simulation:
    """Brains, a server, and a network where each message takes its time or is lost; clocks run alike."""

    def __init__(self, seed: int, *, brains: int, shards: int) -> None:
        self.chance = random.Random(seed)
        self.shards = shards
        self.server = Server()
        self.now = 0.0
        self.calm = False
        self.brains: list[Simulated] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        for _ in range(brains):
            self.start()

    def start(self) -> None:
        one = Simulated(f"brain-{len(self.brains)}", self.shards)
        self.brains.append(one)
        self._at(self.chance.uniform(0, 3), one, lambda: self._begin(one))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, act = heapq.heappop(self._events)
            act()
            self.check()
        self.now = until
        self.check()

    def check(self) -> None:
        held = Counter(shard for one in self.brains if one.alive for shard in one.election.held(self.now))
        assert not held or max(held.values()) == 1, f"at {self.now}: {held}"

    def fail(self) -> None:
        """Something goes wrong."""
        one = self.chance.choice(self.brains)
        match self.chance.randrange(6):
            case 0:
                one.alive = False
            case 1:
                one.frozen_until = self.now + self.chance.uniform(0, 40)
            case 2:
                one.cut_off_until = self.now + self.chance.uniform(0, 40)
            case 3:
                self.start()
            case 4:  # it ends in good order, if its releases arrive
                if one.alive and max(one.frozen_until, one.cut_off_until) <= self.now:
                    for step in one.election.leave():
                        self._arrive(one, step)
                    one.alive = False
            case 5:
                for each in self.brains:
                    each.cut_off_until = self.now + self.chance.uniform(0, 30)

    def heal(self) -> None:
        self.calm = True
        for one in self.brains:
            one.cut_off_until = one.frozen_until = self.now
        if not any(one.alive for one in self.brains):
            self.start()

    def _begin(self, one: Simulated) -> None:
        if not one.alive:
            return
        one.round += 1
        number = one.round
        self._at(TIMEOUT, one, lambda: self._end(one, number))
        if self._passes(one):
            self._at(self._latency(), None, lambda: self._list(one, number))

    def _end(self, one: Simulated, number: int) -> None:
        """The round is over, whatever came of it."""
        if one.round == number and one.alive:
            one.round += 1
            self._at(TIMING.retry * self.chance.uniform(0.8, 1.2), one, lambda: self._begin(one))

    def _list(self, one: Simulated, number: int) -> None:
        leases = self.server.list()
        if self._passes(one):
            self._at(self._latency(), one, lambda: self._listed(one, number, leases))

    def _listed(self, one: Simulated, number: int, leases: list[Lease]) -> None:
        if one.round != number or not one.alive:
            return
        one.election.listed(leases, self.now)
        steps = one.election.plan(self.now)
        self.check()
        self._at(CALM_ROUND - 1.2 * TIMING.retry if self.calm else TIMEOUT, one, lambda: self._end(one, number))
        for step in steps:
            if self._passes(one):
                self._send(one, number, step, self.now)

    def _send(self, one: Simulated, number: int, step: Step, sent: float) -> None:
        def arrive() -> None:
            answer = self._arrive(one, step)
            if answer is not False and self._passes(one):
                self._at(self._latency(), one, lambda: self._written(one, number, step, answer, sent))

        self._at(self._latency(), None, arrive)

    def _arrive(self, one: Simulated, step: Step) -> Lease | bool | None:
        try:
            return self.server.do(one.name, step)
        except Refused:
            return False

    def _written(self, one: Simulated, number: int, step: Step, after: Lease | bool | None, sent: float) -> None:
        if one.round == number and one.alive:
            assert not isinstance(after, bool)
            one.election.written(step, after, sent=sent, now=self.now)

    def _passes(self, one: Simulated) -> bool:
        return self.calm or (one.cut_off_until <= self.now and self.chance.random() > 0.02)

    def _latency(self) -> float:
        if self.calm or self.chance.random() < 0.97:
            return self.chance.uniform(0.001, 0.1)
        return self.chance.uniform(0.1, 30.0)  # long after the sender has given up, too

    def _at(self, wait: float, one: Simulated | None, act: Callable[[], None]) -> None:
        """After a while, and when `one` is not frozen."""

        def when_it_runs() -> None:
            if one is not None and one.frozen_until > self.now:
                self._at(one.frozen_until - self.now, one, act)
            else:
                act()

        heapq.heappush(self._events, (self.now + wait, next(self._order), when_it_runs))


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 1 << 32), brains=st.integers(1, 5), shards=st.integers(1, 12), failures=st.integers(0, 12))
def test_at_most_one_holds_a_shard_whatever_fails_and_all_are_held_evenly_soon_after(
    seed: int, brains: int, shards: int, failures: int
) -> None:
    world = Simulation(seed, brains=brains, shards=shards)
    for _ in range(failures):
        world.run(world.now + world.chance.uniform(0, 20))
        world.fail()
    world.run(world.now + world.chance.uniform(0, 20))
    world.heal()
    # Requests that are still under way count as failures until they have arrived.
    world.run(world.now + 30)
    world.run(world.now + TIMING.lease + 12 * TIMING.retry)
    live = [one for one in world.brains if one.alive]
    held = {one.name: one.election.held(world.now) for one in live}
    assert sorted(shard for some in held.values() for shard in some) == list(range(shards)), held
    assert max(map(len, held.values())) - min(map(len, held.values())) <= 1, held
    world.run(world.now + 20)
    assert {one.name: one.election.held(world.now) for one in live} == held, "nothing moves without a reason"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 32), shards=st.integers(1, 32))
def test_shards_of_a_brain_that_died_are_held_again_within_a_lease_and_a_few_rounds(seed: int, shards: int) -> None:
    world = Simulation(seed, brains=3, shards=shards)
    world.calm = True
    world.run(30)
    world.brains[1].alive = False
    world.run(world.now + TIMING.lease + 3 * CALM_ROUND)
    held = [one.election.held(world.now) for one in world.brains if one.alive]
    assert sorted(shard for some in held for shard in some) == list(range(shards))
