"""The planner: exact element operations, in any order of updates, equal to what a full recompute and a restart give."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes.nftables import FakeTable
from vcproxy.model.addresses import parse_address, parse_prefix
from vcproxy.model.forwarding import Action, ForwardedFrontend, ForwardedPort, Masquerade
from vcproxy.model.services import FrontendKind, PortKey, Protocol
from vcproxy_nftables import adopt, repair
from vcproxy_nftables.affinity import MAX_TARGET_IDS, affinity_class
from vcproxy_nftables.plan import Planner
from vcproxy_nftables.planned import Plan
from vcproxy_nftables.pools import NUMBER_MASK, NUMBERS, REJECT, PoolNumbers, is_affine
from vcproxy_nftables.specs import FAMILY, ORDER, PORT, TENANTS, zone_value
from vcproxy_nftables.state import Tenant


def targets(*numbers: int, port: int = 80) -> bytes:
    return b"".join(bytes((10, 0, number >> 8, number & 255)) + port.to_bytes(2, "big") for number in sorted(numbers))


def cluster_ip(address: str, port: int = 80, action: Action = Action.CLUSTER) -> ForwardedFrontend:
    return ForwardedFrontend(FrontendKind.CLUSTER_IP, parse_address(address), port, action, action, Masquerade.NONLOCAL)


def node_port(
    port: int, inside: Action = Action.CLUSTER, outside: Action = Action.CLUSTER, family: int = 4
) -> ForwardedFrontend:
    masquerade = Masquerade.ALWAYS if inside is outside else Masquerade.HOST
    return ForwardedFrontend(FrontendKind.NODE_PORT, bytes(4 if family == 4 else 16), port, inside, outside, masquerade)


def load_balancer(address: str, port: int = 80) -> ForwardedFrontend:
    return ForwardedFrontend(
        FrontendKind.LOAD_BALANCER, parse_address(address), port, Action.CLUSTER, Action.CLUSTER, Masquerade.ALWAYS
    )


def key(name: str = "web", protocol: Protocol = Protocol.TCP) -> PortKey:
    return PortKey("default", name, "", protocol)


@dataclass
class World:
    """A planner and the table that it writes."""

    table: FakeTable = field(default_factory=FakeTable)
    planner: Planner = field(default_factory=Planner)
    fixed: adopt.Fixed = field(default_factory=lambda: {TENANTS: {}})
    plan: Plan = field(default_factory=Plan)
    limit: int = 100_000
    rejected: dict[PortKey, str] = field(default_factory=dict)

    def tenant(self, uid: str) -> Tenant:
        tenant = self.planner.tenants.get(uid)
        if tenant is None:
            zone = 0 if uid == "super" else 100 + len(self.planner.tenants)
            tenant = self.planner.tenants[uid] = Tenant(uid, zone)
            if zone:
                self.fixed[TENANTS][zone_value(zone)] = uid.encode()
                self.plan.changes.set(TENANTS, zone_value(zone), None, uid.encode())
        return tenant

    def put(self, uid: str, *ports: ForwardedPort) -> int:
        self.rejected = {each.key: each.reason for each in self.planner.put(self.plan, self.tenant(uid), ports)}
        return self.commit()

    def remove(self, uid: str, *keys: PortKey) -> int:
        for each in keys:
            self.planner.remove(self.plan, self.tenant(uid), each)
        return self.commit()

    def commit(self) -> int:
        """Commit what was planned; returns the operations."""
        self.last, self.plan = self.plan, Plan()
        batches = self.table.commit(self.last.changes, limit=self.limit)
        for family, number in self.last.freed:
            self.planner.numbers[family].release(number)
        return sum(map(len, batches))

    def drift(self) -> int:
        """Operations that a repair would need now."""
        plan, drift = repair.difference(
            adopt.read(self.table),  # type: ignore[arg-type]
            [tenant for tenant in self.planner.tenants.values() if not tenant.adopted],
            self.fixed,
            adopt.Image(),
            self.planner.node_addresses,
        )
        assert (drift.missing, drift.foreign) == (0, 0) or plan.changes.transactions(lambda: FakeBatchLike())  # type: ignore[arg-type, return-value]
        return drift.missing + drift.foreign

    def restarted(self, order: Iterable[str]) -> "World":
        """A new planner over the same table, told everything anew; `order` of tenants."""
        image = adopt.read(self.table)  # type: ignore[arg-type]
        world = World(table=self.table, fixed=adopt.fixed(image))
        world.planner.node_addresses = self.planner.node_addresses
        adopt.register(image, world.planner)
        for uid in order:
            old = self.planner.tenants[uid]
            tenant = world.tenant(uid)
            tenant.overlay = old.overlay
            adoption = adopt.Adoption(image, world.planner, tenant, world.plan)
            world.planner.set_ranges(world.plan, tenant, old.ranges)
            wanted = [port.forwarded for port in old.ports.values()]
            world.rejected = {
                each.key: each.reason for each in world.planner.put(world.plan, tenant, wanted, hint=adoption.hint)
            }
            adoption.finish()
        return world


class FakeBatchLike:
    """Counts nothing; only there to be filled."""

    def __len__(self) -> int:
        return 1

    def __getattr__(self, _: str) -> object:
        return lambda *args, **kwargs: None


def meaning(world: World) -> dict[object, object]:
    """What the table says, without pool numbers, slot orders and target ids."""
    image = adopt.read(world.table)  # type: ignore[arg-type]
    result: dict[object, object] = {}
    skipped = {spec for maps in FAMILY.values() for spec in (maps.affine_pools, maps.affine_targets, maps.affine_ids)}
    for spec, held in image.elements.items():
        if spec not in skipped:
            result |= {(spec.name, where): value for where, value in held.items()}
    for (_, family), specs in PORT.items():
        for spec in specs[:5]:
            for where, value in image.elements[spec].items():
                number = int.from_bytes(value[:4], ORDER)
                if number >= NUMBERS:
                    slots = image.pools[family][number & NUMBER_MASK]
                    width = 6 if family == 4 else 18
                    affine = image.elements[FAMILY[family].affine_pools].get((number & NUMBER_MASK).to_bytes(4, ORDER))
                    assert is_affine(number) == (affine is not None)
                    members = frozenset(slots[at : at + width] for at in range(0, len(slots), width))
                    result[spec.name, where] = members, len(slots), affine, value[4:]
    return result


PORTS = [key(name, protocol) for name in ("a", "b", "c") for protocol in (Protocol.TCP, Protocol.UDP)]
UIDS = ["super", "acme", "bolt"]
actions = st.sampled_from([Action.CLUSTER, Action.LOCAL, Action.DROP, Action.REJECT])
packed = st.sets(st.integers(1, 12), max_size=6).map(lambda numbers: targets(*numbers))
frontends = st.lists(
    st.one_of(
        st.builds(cluster_ip, st.sampled_from(["10.96.0.1", "10.96.0.2"]), st.sampled_from([80, 81]), actions),
        st.builds(node_port, st.sampled_from([30000, 30001]), actions, actions),
        st.builds(load_balancer, st.sampled_from(["198.51.100.1", "198.51.100.2"]), st.just(80)),
    ),
    max_size=4,
).map(lambda found: tuple(dict.fromkeys(found)))


@st.composite
def forwarded(draw: st.DrawFn) -> ForwardedPort:
    cluster, local = draw(packed), draw(packed)
    return ForwardedPort(
        draw(st.sampled_from(PORTS)),
        draw(frontends),
        cluster4=cluster,
        local4=local,
        affinity_seconds=draw(st.sampled_from([0, 0, 10, 10800])),
        source_ranges=draw(st.sampled_from([(), (parse_prefix("203.0.113.0/24"), parse_prefix("203.0.113.9/32"))])),
        own4=b"".join(local[at : at + 4] for at in range(0, len(local), 6)),
        serving4=cluster,
    )


steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from(UIDS), forwarded()),
        st.tuples(st.just("remove"), st.sampled_from(UIDS), st.sampled_from(PORTS)),
        st.tuples(st.just("ranges"), st.sampled_from(UIDS), st.sampled_from([(), (parse_prefix("10.96.0.0/16"),)])),
        st.tuples(st.just("overlay"), st.sampled_from(["acme", "bolt"]), st.booleans()),
        st.tuples(
            st.just("node"), st.just(""), st.sampled_from([frozenset(), frozenset({parse_address("203.0.113.7")})])
        ),
        st.tuples(st.just("commit"), st.just(""), st.none()),
    ),
    max_size=25,
)


def run(found: list[tuple[str, str, object]], limit: int = 100_000) -> World:
    world = World(limit=limit)
    for what, uid, value in found:
        match what:
            case "put":
                world.planner.put(world.plan, world.tenant(uid), [value])  # type: ignore[arg-type]
            case "remove":
                world.planner.remove(world.plan, world.tenant(uid), value)  # type: ignore[arg-type]
            case "ranges":
                world.planner.set_ranges(world.plan, world.tenant(uid), value)  # type: ignore[arg-type]
            case "overlay":
                world.tenant(uid).overlay = bool(value)
                world.planner.review(world.plan, world.tenant(uid))
            case "node":
                world.planner.set_node_addresses(world.plan, value)  # type: ignore[arg-type]
            case "commit":
                world.commit()
    world.commit()
    return world


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=200)
@given(steps, st.permutations(UIDS))
def test_updates_in_any_order_leave_what_the_mirror_wants_and_a_restart_writes_nothing(
    found: list[tuple[str, str, object]], order: list[str]
) -> None:
    world = run(found)
    assert world.drift() == 0
    again = world.restarted([uid for uid in order if uid in world.planner.tenants])
    assert again.commit() == 0
    assert again.drift() == 0


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=150)
@given(steps)
def test_the_same_ends_as_when_it_is_said_at_once(found: list[tuple[str, str, object]]) -> None:
    world = run(found)
    if any(port.blocked for tenant in world.planner.tenants.values() for port in tenant.ports.values()):
        return  # who came first is history
    fresh = World()
    fresh.planner.node_addresses = world.planner.node_addresses
    for uid, tenant in world.planner.tenants.items():
        fresh.planner.tenants[uid] = Tenant(uid, tenant.zone)
        fresh.tenant(uid).overlay = tenant.overlay
        if tenant.zone:
            fresh.plan.changes.set(TENANTS, zone_value(tenant.zone), None, uid.encode())
        fresh.planner.set_ranges(fresh.plan, fresh.tenant(uid), tenant.ranges)
        fresh.put(uid, *(port.forwarded for port in tenant.ports.values()))
    assert meaning(fresh) == meaning(world)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=50)
@given(steps)
def test_small_transactions_end_in_the_same_table(found: list[tuple[str, str, object]]) -> None:
    assert run(found, limit=3).table.maps == dict(run(found).table.maps.items())


def web(*numbers: int, **more: object) -> ForwardedPort:
    return ForwardedPort(key(), (cluster_ip("10.96.0.1"),), cluster4=targets(*numbers), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "after", "operations"),
    [
        (web(1, 2, 3), web(1, 2, 3), 0),
        (web(1, 2, 3), web(1, 2, 3, 4), 1 + 2),  # a slot; the frontend's value, replaced
        (web(1, 2, 3), web(1, 2), 1 + 2),
        (web(1, 2, 3), web(2, 3), 3 + 2),  # the last slot moves
        (web(1, 2, 3), web(1, 2, 9), 2),  # in place: the frontend stays
        (web(1), ForwardedPort(key()), 3),  # slot, frontend, virtual IP
        (web(1), web(), 3),  # slot; the frontend now rejects
    ],
    ids=["nothing", "endpoint added", "last removed", "first removed", "replaced", "service removed", "no endpoints"],
)
def test_cost_follows_the_change(before: ForwardedPort, after: ForwardedPort, operations: int) -> None:
    world = World()
    world.put("acme", *(web(*range(100, 200)) for _ in range(1)), before)
    assert world.put("acme", after) == operations


def test_frontends_of_a_port_share_its_pool() -> None:
    world = World()
    port = ForwardedPort(key(), (cluster_ip("10.96.0.1"), node_port(30000)), cluster4=targets(1, 2))
    world.put("super", port)
    values = {
        value[:4]
        for spec in (PORT[Protocol.TCP, 4].frontends, PORT[Protocol.TCP, 4].nodeports)
        for value, _, _ in world.table.maps[spec].values()
    }
    assert len(values) == 1
    assert len(world.table.maps[FAMILY[4].endpoints]) == 2


def test_the_first_holder_of_a_node_port_keeps_it_and_the_next_gets_it_when_it_goes() -> None:
    world = World()
    for uid in ("acme", "bolt"):
        world.put(uid, ForwardedPort(key(), (node_port(30000),), cluster4=targets(1)))
    assert world.rejected == {key(): "IPv4 node port 30000 is held by another tenant"}
    held = world.table.maps[PORT[Protocol.TCP, 4].nodeports]
    assert [comment for _, comment, _ in held.values()] == ["acme"]
    world.remove("acme", key())
    assert [comment for _, comment, _ in held.values()] == ["bolt"]
    assert not world.planner.tenants["bolt"].ports[key()].blocked


def test_a_holder_keeps_its_address_through_a_restart_whoever_is_told_about_first() -> None:
    world = World()
    for uid in ("acme", "bolt"):
        world.put(uid, ForwardedPort(key(), (node_port(30000),), cluster4=targets(1)))
    again = world.restarted(["bolt", "acme"])
    assert again.planner.tenants["bolt"].ports[key()].blocked
    assert not again.planner.tenants["acme"].ports[key()].blocked
    assert again.commit() == 0


def test_two_services_that_swap_addresses_in_one_update_cost_two_replaced_values() -> None:
    world = World()
    one, two = key("one"), key("two")
    world.put(
        "acme",
        ForwardedPort(one, (cluster_ip("10.96.0.1"),), cluster4=targets(1)),
        ForwardedPort(two, (cluster_ip("10.96.0.2"),), cluster4=targets(2)),
    )
    exchanged = (
        ForwardedPort(one, (cluster_ip("10.96.0.2"),), cluster4=targets(1)),
        ForwardedPort(two, (cluster_ip("10.96.0.1"),), cluster4=targets(2)),
    )
    assert world.put("acme", *exchanged) == 4
    assert not world.rejected
    assert world.drift() == 0


def test_an_overlay_tenant_has_no_public_frontends_but_keeps_its_cluster_ip() -> None:
    world = World()
    world.tenant("acme").overlay = True
    world.put("acme", ForwardedPort(key(), (cluster_ip("10.96.0.1"), node_port(30000)), cluster4=targets(1)))
    assert "node port 30000 is public" in world.rejected[key()]
    assert len(world.table.maps[PORT[Protocol.TCP, 4].frontends]) == 1
    assert not world.table.maps.get(PORT[Protocol.TCP, 4].nodeports)


def test_a_service_without_any_endpoint_rejects() -> None:
    world = World()
    world.put("acme", ForwardedPort(key(), (cluster_ip("10.96.0.1", action=Action.REJECT),)))
    ((value, _, _),) = world.table.maps[PORT[Protocol.TCP, 4].frontends].values()
    assert int.from_bytes(value, ORDER) == REJECT


@pytest.mark.parametrize(
    ("wanted", "programmed"), [(0, 0), (1, 1), (999, 999), (1001, 1010), (10800, 10800), (86399, 86400)]
)
def test_affinity_timeouts_have_three_digits(wanted: int, programmed: int) -> None:
    assert affinity_class(wanted) == programmed


def test_a_target_that_leaves_takes_its_id_with_it_and_the_others_keep_theirs() -> None:
    world = World()
    world.put("acme", web(1, 2, 3, affinity_seconds=10))
    ids = dict(world.planner.tenants["acme"].ports[key()].pools[0].ids)  # type: ignore[union-attr]
    world.put("acme", web(2, 3, 4, affinity_seconds=10))
    after = world.planner.tenants["acme"].ports[key()].pools[0].ids  # type: ignore[union-attr]
    assert {target: after[target] for target in (targets(2), targets(3))} == {
        target: ids[target] for target in (targets(2), targets(3))
    }
    assert after[targets(4)] not in ids.values()
    assert len(world.table.maps[FAMILY[4].affine_targets]) == 3


def test_a_pool_whose_number_says_otherwise_gets_another() -> None:
    """So it is in tables of layouts in which numbers said nothing, and whenever affinity is switched."""

    class Older(PoolNumbers):
        def take(self, *, affine: bool) -> int:
            return super().take(affine=False)

    world = World()
    world.planner.numbers = {4: Older(), 6: Older()}
    world.put("acme", web(1, 2, 3, affinity_seconds=10))
    assert not any(map(is_affine, adopt.read(world.table).pools[4]))  # type: ignore[arg-type]
    world = world.restarted(["acme"])
    world.commit()
    assert meaning(world)
    assert world.drift() == 0
    for seconds in (0, 10):
        world.put("acme", web(1, 2, 3, affinity_seconds=seconds))
        assert meaning(world)
        assert len(adopt.read(world.table).pools[4]) == 1  # type: ignore[arg-type]


def test_affinity_beyond_the_ids_balances_without_binding() -> None:
    world = World()
    world.put("acme", web(*range(1, MAX_TARGET_IDS + 100), affinity_seconds=10))
    assert len(world.table.maps[FAMILY[4].affine_targets]) == MAX_TARGET_IDS
    world.put("acme", web(*range(50, MAX_TARGET_IDS + 150), affinity_seconds=10))
    assert len(world.table.maps[FAMILY[4].affine_targets]) == MAX_TARGET_IDS
    assert world.drift() == 0


UDP = key("dns", Protocol.UDP)


def dns(*numbers: int, serving: Iterable[int] = (), frontend: ForwardedFrontend | None = None) -> ForwardedPort:
    return ForwardedPort(
        UDP,
        (frontend or cluster_ip("10.96.0.10", 53),),
        cluster4=targets(*numbers, port=53),
        serving4=targets(*(serving or numbers), port=53),
    )


@pytest.mark.parametrize(
    ("before", "after", "serving"),
    [
        (None, dns(1), {1}),
        (dns(), dns(1), {1}),
        (dns(1, 2), dns(2), {2}),
        (dns(1, 2), dns(2, serving=[1, 2]), None),
        (dns(1), dns(1, 2), None),
        (dns(1), ForwardedPort(UDP), set()),
    ],
    ids=["new service", "first endpoint", "endpoint gone", "still serving elsewhere", "endpoint added", "service gone"],
)
def test_udp_flows_that_must_be_looked_at(
    before: ForwardedPort | None, after: ForwardedPort, serving: set[int] | None
) -> None:
    world = World()
    if before:
        world.put("acme", before)
    world.put("acme", after)
    destination = (parse_address("10.96.0.10"), 53)
    if serving is None:
        assert not world.last.flows
    else:
        flows = world.last.flows[world.tenant("acme").zone]
        assert flows[destination] == {(bytes((10, 0, 0, number)), 53) for number in serving}


def test_udp_node_ports_are_looked_at_on_each_node_address() -> None:
    world = World()
    world.planner.accepting = frozenset({parse_address("192.0.2.1"), parse_address("fd00::1")})
    world.put("super", dns(1, frontend=node_port(30053)))
    assert set(world.last.flows[Plan.PUBLIC]) == {(parse_address("192.0.2.1"), 30053)}


def test_where_the_node_is_allowed_the_load_balancers_own_address_is_too() -> None:
    world = World()
    port = ForwardedPort(
        key(), (load_balancer("198.51.100.1"),), cluster4=targets(1), source_ranges=(parse_prefix("203.0.113.0/24"),)
    )
    world.put("super", port)
    allowed = world.table.maps[PORT[Protocol.TCP, 4].allowed]
    assert len(allowed) == 1
    world.planner.set_node_addresses(world.plan, frozenset({parse_address("203.0.113.7")}))
    assert world.commit() == 1
    assert len(allowed) == 2


def test_source_ranges_of_the_other_family_wall_nothing_off() -> None:
    world = World()
    frontends = (load_balancer("198.51.100.1"), load_balancer("2001:db8:100::1"))
    ranges = (parse_prefix("203.0.113.0/24"),)
    world.put("super", ForwardedPort(key(), frontends, cluster4=targets(1), source_ranges=ranges))
    assert len(world.table.maps[PORT[Protocol.TCP, 4].firewalled]) == 1
    assert not world.table.maps.get(PORT[Protocol.TCP, 6].firewalled)
