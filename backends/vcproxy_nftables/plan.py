"""From wanted forwarding to exact element operations: the planner. Pure: no kernel, no clock.

The planner is the mirror of what the table should hold. Each call changes the mirror and notes in a `Plan` what that
means for the kernel; the work of a call is in proportion to the ports that it names.

Frontends are claimed. Two ports may want the same public address (two tenants granted the same node port), or, while
Services are replaced, the same ClusterIP. The first holder keeps it, the others are told why not and wait; when the
holder gives it up, the longest waiting one gets it in the same transaction.
"""

from collections.abc import Callable, Iterable

from msgspec.structs import replace

from vcproxy.backend.protocol import Rejection
from vcproxy.model.addresses import Prefix, format_target
from vcproxy.model.forwarding import Action, ForwardedFrontend, ForwardedPort
from vcproxy.model.services import FrontendKind, PortKey, Protocol
from vcproxy_nftables.affinity import affinity_class, bind
from vcproxy_nftables.elements import MapSpec
from vcproxy_nftables.planned import Flows, Plan
from vcproxy_nftables.pools import (
    AFFINE,
    MAX_TARGETS,
    NUMBERS,
    PoolNumbers,
    arrange,
    is_affine,
    pool_value,
    size_class,
    split,
)
from vcproxy_nftables.specs import FAMILY, ORDER, PORT, number, port_field
from vcproxy_nftables.state import (
    POOLS,
    WIDTH,
    Pool,
    Port,
    Tenant,
    claim_of,
    elements,
    first_of_each,
    is_public,
    pools_of,
    range_elements,
    shared,
)

Claim = tuple[MapSpec, bytes]
Hint = Callable[[Port, ForwardedPort], tuple[Pool | None, ...]]


class Planner:
    """The mirror of what the table holds for tenants. Not thread-safe."""

    def __init__(self) -> None:
        self.tenants: dict[str, Tenant] = {}
        self.numbers = {4: PoolNumbers(), 6: PoolNumbers()}
        self.node_addresses: frozenset[bytes] = frozenset()
        self.accepting: frozenset[bytes] = frozenset()
        """Where NodePorts are accepted."""
        self.promised: dict[Claim, str] = {}
        """Public frontends that tenants hold in an adopted table, by uid, until these tenants have been told about."""
        self._claims: dict[Claim, Port] = {}
        self._waiting: dict[Claim, list[Port]] = {}

    def put(
        self, plan: Plan, tenant: Tenant, ports: Iterable[ForwardedPort], *, hint: Hint | None = None
    ) -> list[Rejection]:
        """Make ports these. `hint`: tells the pools that the kernel has for a port that is new to the mirror.

        Returns the ports that keep their last form, and those that do not get all their frontends, with the reasons.
        """
        rejected: dict[PortKey, str] = {}
        possible: list[ForwardedPort] = []
        for forwarded in ports:
            if reason := self._impossible(forwarded):
                rejected[forwarded.key] = reason
            else:
                possible.append(forwarded)
        # First what they give up, so that ports may exchange addresses within one update.
        shrunk: set[PortKey] = set()
        for forwarded in possible:
            port = tenant.ports.get(forwarded.key)
            if port is not None and port.forwarded.frontends != forwarded.frontends:
                claims = {claim_of(port, frontend) for frontend in forwarded.frontends}
                kept = tuple(frontend for frontend in port.forwarded.frontends if claim_of(port, frontend) in claims)
                if len(kept) < len(port.forwarded.frontends):
                    self._change(plan, port, replace(port.forwarded, frontends=kept), keep_pools=True)
                    shrunk.add(forwarded.key)
        for forwarded in possible:
            port = tenant.ports.get(forwarded.key)
            if port is None and hint is None and self._bear(plan, tenant, forwarded):
                continue
            if port is None:
                port = tenant.ports[forwarded.key] = Port(tenant, ForwardedPort(forwarded.key))
                port.pools = hint(port, forwarded) if hint else port.pools
            if port.blocked or port.forwarded != forwarded or forwarded.key in shrunk:
                self._change(plan, port, forwarded)
        for forwarded in possible:
            if blocked := tenant.ports[forwarded.key].blocked:
                rejected[forwarded.key] = "; ".join(dict.fromkeys(blocked.values()))
        return [Rejection(key, reason) for key, reason in rejected.items()]

    def remove(self, plan: Plan, tenant: Tenant, key: PortKey) -> None:
        """Remove a port; an unknown one is no error."""
        port = tenant.ports.get(key)
        if port is not None:
            self._change(plan, port, ForwardedPort(key))
            del tenant.ports[key]

    def set_ranges(self, plan: Plan, tenant: Tenant, prefixes: tuple[Prefix, ...]) -> None:
        """Make these a tenant's virtual ranges."""
        if prefixes == tenant.ranges:
            return
        before, after = range_elements(tenant, tenant.ranges), range_elements(tenant, prefixes)
        tenant.ranges = prefixes
        for spec, key in before - after:
            plan.changes.set(spec, key, b"", None)
        for spec, key in after - before:
            plan.changes.set(spec, key, None, b"")

    def review(self, plan: Plan, tenant: Tenant) -> None:
        """Decide anew about a tenant's public frontends, after its attachment has changed."""
        for port in list(tenant.ports.values()):
            if any(is_public(frontend) for frontend in port.forwarded.frontends):
                self._change(plan, port, port.forwarded)

    def set_node_addresses(self, plan: Plan, addresses: frozenset[bytes]) -> None:
        """Make these the node's own addresses, of which firewalls of load balancers must know."""
        walled = [
            (port, first_of_each(elements(port, self.node_addresses)))
            for tenant in self.tenants.values()
            for port in tenant.ports.values()
            if port.forwarded.source_ranges
        ]
        self.node_addresses = addresses
        for port, before in walled:
            _note(plan, before, first_of_each(elements(port, addresses)))

    def _impossible(self, forwarded: ForwardedPort) -> str:
        for family, cluster, local in (
            (4, forwarded.cluster4, forwarded.local4),
            (6, forwarded.cluster6, forwarded.local6),
        ):
            if not (cluster or local):
                continue
            count = max(len(cluster), len(local)) // WIDTH[family]
            if count > MAX_TARGETS:
                return f"it has {count} IPv{family} endpoints; a service port may have {MAX_TARGETS}"
            affine = bool(forwarded.affinity_seconds)
            if self.numbers[family].available(affine=affine) < 2:
                kind = "with" if affine else "without"
                return f"all {AFFINE} pools of IPv{family} {kind} session affinity are in use on this node"
        return ""

    def _change(self, plan: Plan, port: Port, forwarded: ForwardedPort, *, keep_pools: bool = False) -> None:
        """Make a port `forwarded` (which may be what it is), and see who gets what it gives up.

        `keep_pools`: even those that no frontend uses now; this is not the last word about the port.
        """
        old = port.forwarded
        before: dict[Claim, bytes] = {}
        shared_before: list[Claim] = []
        claims: set[Claim] = set()
        if old.frontends:
            before = first_of_each(elements(port, self.node_addresses))
            claims = self._held(port)
        if old.frontends or old.own4 or old.own6:
            shared_before = list(shared(port))
        port.forwarded = forwarded
        released, used = self._claim(port, claims)
        if not keep_pools:
            self._set_pools(plan, port, used)
        after = first_of_each(elements(port, self.node_addresses))
        _note(plan, before, after)
        _recount(plan, port.tenant, shared_before, list(shared(port)))
        if forwarded.key.protocol is Protocol.UDP:
            self._note_flows(plan, port, old, before, after)
        for claim in released:
            self._hand_over(plan, claim)

    def _bear(self, plan: Plan, tenant: Tenant, forwarded: ForwardedPort) -> bool:
        """Make a port that is new and simple, as nearly all are; False, and nothing done, for any other.

        Simple: ClusterIPs that nobody else holds and that lead to endpoints, all on other nodes; no affinity, no flows
        to look at. What follows is what `_change` comes to for such a port, at half the price: a first load is made of
        them.
        """
        protocol, frontends = forwarded.key.protocol, forwarded.frontends
        if forwarded.affinity_seconds or protocol is Protocol.UDP or forwarded.own4 or forwarded.own6 or not frontends:
            return False
        zone, claims, promised = tenant.lead, self._claims, self.promised
        found: dict[Claim, ForwardedFrontend] = {}
        for frontend in frontends:
            address = frontend.address
            six = len(address) == 16
            claim = (PORT[protocol, 6 if six else 4].frontends, zone + address + port_field(frontend.port))
            if (
                frontend.kind is not FrontendKind.CLUSTER_IP
                or frontend.inside is not Action.CLUSTER
                or not (forwarded.cluster6 if six else forwarded.cluster4)
                or claim in claims
                or claim in promised
            ):
                return False
            found[claim] = frontend
        port = tenant.ports[forwarded.key] = Port(tenant, forwarded)
        pools: list[Pool | None] = [None, None, None, None]
        values: dict[int, bytes] = {}
        change, counts = plan.changes.set, tenant.counts
        for claim, frontend in found.items():
            claims[claim] = port
            family = 4 if len(frontend.address) == 4 else 6
            if family not in values:
                packed = forwarded.cluster4 if family == 4 else forwarded.cluster6
                size = len(packed) // WIDTH[family]
                pool = pools[family == 6] = Pool(self.numbers[family].take(affine=False), packed)
                plan.changes.set_pool(family, pool.number, b"", packed)
                values[family] = number(pool_value(pool.number, size))
                if size > 1:
                    plan.classes[family].add(size_class(size))
            change(*claim, None, values[family])
            virtual = (FAMILY[family].virtual_ips, zone + frontend.address)
            held = counts[virtual] = counts.get(virtual, 0) + 1
            if held == 1:
                change(*virtual, None, b"")
        port.pools = tuple(pools)
        return True

    # Claims

    @staticmethod
    def _held(port: Port) -> set[Claim]:
        return {
            claim_of(port, frontend)
            for position, frontend in enumerate(port.forwarded.frontends)
            if position not in port.blocked
        }

    def _claim(self, port: Port, before: set[Claim]) -> tuple[list[Claim], set[int]]:
        """Claim all of a port's frontends and block those that it cannot have.

        Returns what it gave up, and the places in Port.pools that the frontends which it has use.
        """
        blocked: dict[int, str] = {}
        held: set[Claim] = set()
        used: set[int] = set()
        for position, frontend in enumerate(port.forwarded.frontends):
            claim = claim_of(port, frontend)
            if is_public(frontend) and port.tenant.overlay:
                blocked[position] = (
                    f"{_dialled(frontend)} is public, but the tenant has a network of its own on this node, which "
                    "others cannot reach; publish the service in the super cluster, or attach the tenant by address"
                )
            elif (holder := self._holder(claim, port)) is port:
                if claim not in held:  # of two frontends with one address, the first decides
                    held.add(claim)
                    used |= pools_of(frontend)
            else:
                mine = holder is not None and holder.tenant is port.tenant
                owner = str(holder.forwarded.key) if holder and mine else "another tenant"
                blocked[position] = f"{_dialled(frontend)} is held by {owner}"
                waiting = self._waiting.setdefault(claim, [])
                if port not in waiting:
                    waiting.append(port)
        port.blocked = blocked
        released = [claim for claim in before if claim not in held]
        for claim in released:
            del self._claims[claim]
        return released, used

    def _holder(self, claim: Claim, port: Port) -> Port | None:
        """Who holds a claim: `port` from now on, if nobody else does; None for a tenant not told about yet."""
        uid = port.tenant.uid
        return self._claims.setdefault(claim, port) if self.promised.get(claim, uid) == uid else None

    def forget_promises(self, plan: Plan, uid: str) -> None:
        """A tenant has been told about: what it does not hold now, others may have."""
        kept = [claim for claim, owner in self.promised.items() if owner == uid]
        for claim in kept:
            del self.promised[claim]
            self._hand_over(plan, claim)

    def _hand_over(self, plan: Plan, claim: Claim) -> None:
        """Give a claim to the one that waits longest and still wants it, unless somebody has it by now."""
        if claim in self._claims:
            return
        waiting = self._waiting.pop(claim, [])
        while waiting:
            port = waiting.pop(0)
            alive = port.tenant.ports.get(port.forwarded.key) is port
            if alive and any(claim_of(port, port.forwarded.frontends[position]) == claim for position in port.blocked):
                if waiting:
                    self._waiting[claim] = waiting
                self._change(plan, port, port.forwarded)
                if claim in self._claims:
                    return
                waiting = self._waiting.pop(claim, [])

    # Pools

    def _set_pools(self, plan: Plan, port: Port, used: set[int]) -> None:
        seconds = affinity_class(port.forwarded.affinity_seconds)
        pools: list[Pool | None] = [None, None, None, None]
        for place, (action, family) in enumerate(POOLS):
            pool = port.pools[place]
            wanted = port.forwarded.pool(action, family) if place in used else b""
            if pool is not None or wanted:
                pools[place] = self._set_pool(plan, family, pool, wanted, seconds)
        port.pools = tuple(pools)

    def _set_pool(self, plan: Plan, family: int, pool: Pool | None, wanted: bytes, seconds: int) -> Pool | None:
        width = WIDTH[family]
        if pool is not None and wanted and is_affine(pool.number) != bool(seconds):
            self._set_pool(plan, family, pool, b"", 0)
            pool = None
        if pool is None:
            pool = Pool(self.numbers[family].take(affine=bool(seconds)))
        slots = arrange(pool.slots, wanted, width)
        if slots != pool.slots:
            plan.changes.set_pool(family, pool.number, pool.slots, slots)
            pool.slots = slots
        bind(plan, family, pool, seconds if slots else 0)
        if not slots:
            plan.freed.append((family, pool.number))
            return None
        size = size_class(len(slots) // width)
        if size > 1:
            plan.classes[family].add(size)
        return pool

    # Flows

    def _note_flows(
        self, plan: Plan, port: Port, old: ForwardedPort, before: dict[Claim, bytes], after: dict[Claim, bytes]
    ) -> None:
        """Which UDP flows must be looked at: those to what is new (they may have begun untranslated), to what got its
        first target, to what is gone, and to what lost a target."""
        lost = {
            4: _lost(old.serving4, port.forwarded.serving4, WIDTH[4]),
            6: _lost(old.serving6, port.forwarded.serving6, WIDTH[6]),
        }
        for forwarded, gone in ((old, True), (port.forwarded, False)):
            for frontend in forwarded.frontends:
                claim = claim_of(port, frontend)
                was, now = before.get(claim), after.get(claim)
                if was is now is None or (gone and now is not None):
                    continue
                if gone or was is None or lost[frontend.family] or (_is_special(was) and not _is_special(now)):
                    serving = forwarded.serving4 if frontend.family == 4 else forwarded.serving6
                    self._note_flow(plan, port.tenant, frontend, b"" if gone else serving)

    def _note_flow(self, plan: Plan, tenant: Tenant, frontend: ForwardedFrontend, serving: bytes) -> None:
        flows = plan.flows.setdefault(Plan.PUBLIC if is_public(frontend) else tenant.zone, Flows())
        addresses: Iterable[bytes] = (frontend.address,)
        if frontend.kind is FrontendKind.NODE_PORT:
            addresses = (node for node in self.accepting if len(node) == len(frontend.address))
        for address in addresses:
            flows.note((address, frontend.port), serving)


def _is_special(value: bytes | None) -> bool:
    return value is not None and int.from_bytes(value[:4], ORDER) < NUMBERS


def _lost(before: bytes, after: bytes, width: int) -> bool:
    return before != after and not set(split(before, width)) <= set(split(after, width))


def _dialled(frontend: ForwardedFrontend) -> str:
    if frontend.kind is FrontendKind.NODE_PORT:
        return f"IPv{frontend.family} node port {frontend.port}"
    return format_target(frontend.address, frontend.port)


def _note(plan: Plan, before: dict[Claim, bytes], after: dict[Claim, bytes]) -> None:
    if before == after:
        return
    for claim, value in before.items():
        if claim not in after:
            plan.changes.set(*claim, value, None)
    for claim, value in after.items():
        plan.changes.set(*claim, before.get(claim), value)


def _recount(plan: Plan, tenant: Tenant, before: list[Claim], after: list[Claim]) -> None:
    """Count who needs shared elements: the first makes one, the last removes it."""
    if before == after:
        return
    counts = tenant.counts
    for claim in after:
        counts[claim] = counts.get(claim, 0) + 1
        if counts[claim] == 1:
            plan.changes.set(*claim, None, b"")
    for claim in before:
        counts[claim] -= 1
        if not counts[claim]:
            del counts[claim]
            plan.changes.set(*claim, b"", None)
