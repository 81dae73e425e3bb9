"""A first load in pieces, planned while the kernel takes the ones before: as good as one, whatever fails half-way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pytest

from tests.packets.programmed import Programmed, cluster_ip, key, programmed, service
from vcproxy.backend.protocol import BackendError, Drift
from vcproxy.lab import Lab, Node, Pod, Reply, tcp_request
from vcproxy.model.forwarding import ForwardedPort
from vcproxy.model.services import Protocol
from vcproxy_nftables.backend import PIECE
from vcproxy_nftables.batch import Batch
from vcproxy_nftables.specs import PORT
from vcproxy_nftables.wire import NetlinkError

pytestmark = pytest.mark.packets

COUNT = 3 * PIECE + 7
WATCHED = (0, PIECE - 1, PIECE, 2 * PIECE + 3, COUNT - 1)
REFUSED = 2 * PIECE + 1

Send = Callable[[Iterable[Batch]], int]


@dataclass(frozen=True)
class World:
    node: Node
    client: Pod
    pod: Pod

    def load(self) -> list[ForwardedPort]:
        return [service(cluster_ip(address(number)), [self.pod], name=name(number)) for number in range(COUNT)]

    def serves(self, number: int) -> bool:
        outcome = tcp_request(self.client, address(number), 80, timeout=1)
        return isinstance(outcome, Reply) and outcome.pod == "pod"


def address(number: int) -> str:
    return f"10.97.{number >> 8}.{number & 255}"


def name(number: int) -> str:
    return f"s{number}"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Lab("vcp-nft-load") as lab:
        one, two = lab.node("one"), lab.node("two")
        made = World(
            one,
            one.flat_pod("client", "10.200.1.2", "fd00:200:0:1::2"),
            two.flat_pod("pod", "10.200.2.2", "fd00:200:0:2::2"),
        )
        lab.serve(made.pod, tcp=[80])
        yield made


def sending(backend: Programmed, instead: Callable[[int, list[Batch], Send], int]) -> None:
    """Every sending is `instead`'s: it gets its number, from 0, the batches, and what truly sends."""
    kernel = backend.backend._kernel
    send, sent = kernel.send, iter(range(10_000))
    kernel.send = lambda batches: instead(next(sent), list(batches), send)  # type: ignore[method-assign]


def test_all_of_it_answers(world: World) -> None:
    sendings = []
    with programmed(world.node) as (backend,):

        def counted(number: int, batches: list[Batch], send: Send) -> int:
            sendings.append(number)
            return send(batches)

        sending(backend, counted)
        applied = backend.put("super", *world.load(), complete=True)
        assert len(sendings) == 4
        assert applied.rejections == ()
        assert all(map(world.serves, WATCHED))
        assert backend.repair() == Drift()
        assert backend.reopened().put("super", *world.load(), complete=True).operations == 0


def test_of_two_that_want_one_address_the_first_has_it(world: World) -> None:
    ports = world.load()
    ports[REFUSED] = service(cluster_ip(address(3)), [world.client], name=name(REFUSED))
    with programmed(world.node) as (backend,):
        applied = backend.put("super", *ports, complete=True)
        assert [rejection.key for rejection in applied.rejections] == [key(name(REFUSED))]
        assert world.serves(3)
        backend.remove("super", key(name(3)))
        assert not world.serves(3), "it is the other's now"
        assert backend.repair() == Drift()


def test_what_the_kernel_refuses_costs_the_others_nothing(world: World) -> None:
    poison = PORT[Protocol.TCP, 4].frontends
    bad = bytes(4) + bytes(map(int, address(REFUSED).split("."))) + (80).to_bytes(2, "big") + bytes(2)

    def refusing(number: int, batches: list[Batch], send: Send) -> int:
        if any(bad in batch.message() for batch in batches):
            raise NetlinkError("no", errno=22, name=poison.name, key=bad)
        return send(batches)

    with programmed(world.node) as (backend,):
        sending(backend, refusing)
        applied = backend.put("super", *world.load(), complete=True)
        assert [rejection.key for rejection in applied.rejections] == [key(name(REFUSED))]
        assert all(map(world.serves, WATCHED))
        assert backend.repair() == Drift()


def test_a_table_that_is_deleted_meanwhile_is_made_again(world: World) -> None:
    def deleting(number: int, batches: list[Batch], send: Send) -> int:
        if number == 2:
            world.node.run(["nft", "delete", "table", "inet", "vcproxy"])
        return send(batches)

    with programmed(world.node) as (backend,):
        sending(backend, deleting)
        assert backend.put("super", *world.load(), complete=True).rejections == ()
        assert all(map(world.serves, WATCHED))
        assert backend.repair() == Drift()


def test_a_socket_that_fails_is_told_and_the_next_repair_mends(world: World) -> None:
    def failing(number: int, batches: list[Batch], send: Send) -> int:
        if number == 1:
            raise OSError(12, "Cannot allocate memory")
        return send(batches)

    with programmed(world.node) as (backend,):
        sending(backend, failing)
        with pytest.raises(BackendError, match="Cannot allocate memory"):
            backend.put("super", *world.load(), complete=True)
        assert world.serves(0), "what was committed before"
        assert not world.serves(COUNT - 1), "nothing behind what failed"
        assert backend.repair().missing
        assert all(map(world.serves, WATCHED))
        assert backend.repair() == Drift()
