"""What the table holds already: read once, sorted by owner, and taken over without a write.

An agent that restarts finds the table that its predecessor left, and the packets that it forwards. Everything that the
mirror needs is in it: the set `tenants` tells zones, the frontend maps tell pool numbers, the endpoint maps tell slots.
So the first complete update of a tenant is planned as if the tenant were new, but with the pools that its frontends
already point to; what the table holds is noted as "before", what is planned as "after", and only differences remain.

Tenants whose update has not come stay as they are (fail static). What belongs to nobody (an element of a zone without a
tenant, a pool that no frontend points to: left by a run that died between two transactions) is an orphan; repair
removes it.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from vcproxy.model.forwarding import ForwardedPort
from vcproxy.model.services import FrontendKind
from vcproxy.model.tenant import SUPER_UID
from vcproxy_nftables.changes import Element, slot_keys
from vcproxy_nftables.elements import Elements, MapSpec, Matrix
from vcproxy_nftables.netlink import Nfnetlink
from vcproxy_nftables.plan import Planner
from vcproxy_nftables.planned import Plan
from vcproxy_nftables.pools import EXACT_SIZES, NUMBER_BITS, NUMBER_MASK, NUMBERS, SIZES, expand
from vcproxy_nftables.specs import (
    ATTACHMENT,
    COMMENTED,
    FAMILY,
    NODE,
    ORDER,
    PORT,
    SUPER,
    TENANTS,
    WANTED,
    ZONED,
    zone_of,
)
from vcproxy_nftables.state import POOLS, WIDTH, Pool, Port, Tenant, affine_elements, claim_of

Values = dict[bytes, bytes]
Fixed = dict[MapSpec, Values]


class Belongings(NamedTuple):
    """A tenant's elements, and its pools as (family, number)."""

    elements: list[Element]
    pools: set[tuple[int, int]]


class Image:
    """The table's content.

    `elements`: by map, keys and values as `changes.Element` has them. `pools`: by family and number, slots (packed
    targets). `broken`: endpoint elements of pools with a hole or a repetition. `zones`: by uid.
    """

    def __init__(self) -> None:
        self.elements: dict[MapSpec, Values] = {spec: {} for spec in WANTED}
        self.pools: dict[int, dict[int, bytes]] = {4: {}, 6: {}}
        self.broken: list[Element] = []
        self.zones: dict[str, int] = {SUPER_UID: 0}
        self.owned: dict[str, Belongings] = {}
        self.orphans = 0


def read(netlink: Nfnetlink) -> Image:
    """Read and sort the whole table. Raises TableMissing, NetlinkError, OSError.

    The endpoints are by far the largest maps, and a dump of one takes the kernel more than linear time. But frontends
    tell which pools there are, and of what size: where a map has exactly as many elements as they make, each is asked
    for by its key, and if all are there, there are no others. Else (somebody meddled, a run died half-way, the kernel
    does not tell how many) the map is dumped.
    """
    image = Image()
    for spec in WANTED:
        image.elements[spec] = _values(spec, netlink.dump(spec))
    facts = netlink.sets()
    for family, specs in FAMILY.items():
        keys = _slots(image, family)
        told = facts[specs.endpoints.name].elements if specs.endpoints.name in facts else None
        found = netlink.get(specs.endpoints, keys) if told == len(keys) else None
        _read_pools(image, family, netlink.dump(specs.endpoints) if found is None else found)
    for key, value in image.elements[TENANTS].items():
        image.zones[value.decode()] = int.from_bytes(key, ORDER)
    _sort(image)
    return image


def _values(spec: MapSpec, found: Elements) -> Values:
    width, octets = spec.key_octets, found.keys.tobytes()
    keys = [octets[at : at + width] for at in range(0, len(octets), width)]
    if found.ends is not None:
        ends = found.ends.tobytes()
        keys = [key + ends[index * width : (index + 1) * width] for index, key in enumerate(keys)]
    if spec.verdict:
        return dict(zip(keys, (verdict.encode() for verdict in found.verdicts), strict=True))
    if not spec.data_octets:
        values = [b""] * len(keys)
    else:
        data, size = found.data.tobytes(), spec.data_octets
        values = [data[at : at + size] for at in range(0, len(data), size)]
    if spec in COMMENTED:
        values = [value + comment.encode() for value, comment in zip(values, found.comments, strict=True)]
    return dict(zip(keys, values, strict=True))


def _slots(image: Image, family: int) -> Matrix:
    """The keys of all slots of the pools that a family's frontends lead to, u1[n, 8]."""
    values: set[bytes] = set()
    for (_, of), specs in PORT.items():
        if of == family:
            for spec in (specs.frontends, specs.public, specs.public_outside, specs.nodeports, specs.nodeports_outside):
                values.update(value[:4] for value in image.elements[spec].values())
    told = np.frombuffer(b"".join(values), np.uint32)
    told = np.sort(told[told >= NUMBERS])
    return slot_keys(told & NUMBER_MASK, np.array(SIZES)[told >> NUMBER_BITS])


def _read_pools(image: Image, family: int, found: Elements) -> None:
    if not len(found.keys):
        return
    width = WIDTH[family]
    pairs = np.ascontiguousarray(found.keys).view(np.uint32)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    numbers, slots = pairs[order, 0], pairs[order, 1]
    data = np.ascontiguousarray(found.data[order])
    targets = np.ascontiguousarray(data[:, :width]).tobytes()
    starts = np.flatnonzero(np.concatenate(([True], numbers[1:] != numbers[:-1])))
    ends = np.append(starts[1:], len(numbers))
    dense = slots[ends - 1] + 1 == ends - starts  # sorted and without repetitions: so the last tells
    for start, end, whole, pool in zip(
        starts.tolist(), ends.tolist(), dense.tolist(), numbers[starts].tolist(), strict=True
    ):
        packed = targets[start * width : end * width]
        primary = _primary(packed, width) if whole else b""
        if primary:
            image.pools[family][pool] = primary
        else:
            spec = FAMILY[family].endpoints
            image.broken += (
                Element(spec, pairs[order[row]].tobytes(), data[row].tobytes()) for row in range(start, end)
            )


def _primary(packed: bytes, width: int) -> bytes:
    """The slots without the surplus of their class; b"" if a target is in it twice, or the surplus is another."""
    count = len(packed) // width
    targets = len({packed[at : at + width] for at in range(0, len(packed), width)})
    primary = packed[: targets * width]
    if targets == count and count <= EXACT_SIZES:
        return packed
    return primary if expand(primary, width) == packed else b""


def _sort(image: Image) -> None:
    """Find out what belongs to whom."""
    elements: dict[str, list[Element]] = defaultdict(list)
    owner_of_pool: dict[tuple[int, int], str] = {}
    uids = {zone: uid for uid, zone in image.zones.items()}

    def give(uid: str | None, spec: MapSpec, key: bytes, value: bytes) -> None:
        if uid is None:
            image.orphans += 1
        else:
            elements[uid].append(Element(spec, key, value))

    def point(uid: str | None, family: int, value: bytes) -> None:
        target = int.from_bytes(value[:4], ORDER)
        if uid is not None and target >= NUMBERS:
            owner_of_pool[family, target & NUMBER_MASK] = uid

    for spec in ZONED:
        for key, value in image.elements[spec].items():
            give(uids.get(zone_of(spec, key)), spec, key, value)
    for spec in SUPER:
        for key, value in image.elements[spec].items():
            give(SUPER_UID, spec, key, value)
    for (_, family), specs in PORT.items():
        for key, value in image.elements[specs.frontends].items():
            point(uids.get(zone_of(specs.frontends, key)), family, value)
        for holder, outside, dependents in (
            (specs.public, specs.public_outside, (specs.firewalled, specs.allowed, *specs[7:9])),
            (specs.nodeports, specs.nodeports_outside, specs[9:11]),
        ):
            owners: dict[bytes, str] = {}
            for key, value in image.elements[holder].items():
                uid = value[4:].decode()
                if uid in image.zones:
                    owners[key] = uid
                give(owners.get(key), holder, key, value)
                point(owners.get(key), family, value)
            for spec in (outside, *dependents):
                for key, value in image.elements[spec].items():
                    uid_of_key = owners.get(key[: holder.key_octets])
                    give(uid_of_key, spec, key, value)
                    if spec is outside:
                        point(uid_of_key, family, value)
    for family, maps in FAMILY.items():
        for spec in (maps.affine_pools, maps.affine_targets, maps.affine_ids):
            for key, value in image.elements[spec].items():
                pool = int.from_bytes(key[:4], ORDER) & NUMBER_MASK
                give(owner_of_pool.get((family, pool)), spec, key, value)
    owned: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for family, held in image.pools.items():
        for pool in held:
            owner = owner_of_pool.get((family, pool))
            if owner is None:
                image.orphans += 1
            else:
                owned[owner].add((family, pool))
    image.orphans += len(image.broken)
    for uid in elements.keys() | owned.keys() | image.zones.keys():
        if uid != SUPER_UID or uid in elements:
            image.owned[uid] = Belongings(elements[uid], owned[uid])


def fixed(image: Image) -> Fixed:
    """What does not belong to tenants: zones, attachments, the node's facts."""
    return {spec: dict(image.elements[spec]) for spec in (TENANTS, *ATTACHMENT, *NODE)}


class Adoption:
    """Takes over one tenant: note all it has, plan all it wants, and what is both costs nothing."""

    def __init__(self, image: Image, planner: Planner, tenant: Tenant, plan: Plan) -> None:
        self._image = image
        self._planner = planner
        self._tenant = tenant
        self._plan = plan
        self._owned = image.owned.pop(tenant.uid, Belongings([], set()))
        self._free = set(self._owned.pools)
        for spec, key, value in self._owned.elements:
            plan.changes.set(spec, key, value, None)
        for family, pool in self._owned.pools:
            plan.changes.set_pool(family, pool, image.pools[family][pool], b"")

    def hint(self, port: Port, forwarded: ForwardedPort) -> tuple[Pool | None, ...]:
        """The pools that the kernel has for a port's frontends, each handed out once."""
        found: dict[int, Pool] = {}
        for frontend in forwarded.frontends:
            family = frontend.family
            specs = PORT[forwarded.key.protocol, family]
            spec, key = claim_of(Port(self._tenant, forwarded), frontend)
            outside = specs.nodeports_outside if frontend.kind is FrontendKind.NODE_PORT else specs.public_outside
            for action, holder in ((frontend.inside, spec), (frontend.outside, outside)):
                value = self._image.elements[holder].get(key)
                target = int.from_bytes(value[:4], ORDER) if value else 0
                number = target & NUMBER_MASK
                if target < NUMBERS or (action, family) not in POOLS or (family, number) not in self._free:
                    continue
                place = POOLS.index((action, family))
                if place not in found and forwarded.pool(action, family):
                    self._free.discard((family, number))
                    found[place] = self._pool(family, number)
        return tuple(found.get(place) for place in range(len(POOLS)))

    def _pool(self, family: int, number: int) -> Pool:
        specs = FAMILY[family]
        lead = number.to_bytes(4, ORDER)
        pool = Pool(number, self._image.pools[family][number])
        verdict = self._image.elements[specs.affine_pools].get(lead, b"")
        if verdict:
            pool.seconds = int(verdict.rpartition(b"_")[2])
            ids = self._image.elements[specs.affine_ids]
            width = WIDTH[family]
            for at in range(0, len(pool.slots), width):
                target = pool.slots[at : at + width]
                if value := ids.get(lead + target + b"\0\0"):
                    pool.ids[target] = int.from_bytes(value, ORDER) >> NUMBER_BITS
        return pool

    def finish(self) -> None:
        """After all ports were put: what was taken over unchanged stays, what nobody took goes."""
        changes = self._plan.changes
        for port in self._tenant.ports.values():
            for (_, family), pool in zip(POOLS, port.pools, strict=True):
                if pool is not None:
                    changes.set_pool(family, pool.number, b"", pool.slots)
                    for spec, key, value in affine_elements(family, pool):
                        changes.set(spec, key, None, value)
        self._plan.freed += self._free
        self._tenant.adopted = False
        self._planner.forget_promises(self._plan, self._tenant.uid)


def register(image: Image, planner: Planner) -> None:
    """Make the tenants of a table known to a planner; keep their pools' numbers and public addresses from others."""
    for uid, zone in image.zones.items():
        if uid in image.owned:
            planner.tenants[uid] = Tenant(uid, zone, adopted=True)
    for specs in PORT.values():
        for spec in (specs.public, specs.nodeports):
            for key, value in image.elements[spec].items():
                if (uid := value[4:].decode()) in image.owned:
                    planner.promised[spec, key] = uid
    for family, held in image.pools.items():
        planner.numbers[family].reserve(held)
        spec = FAMILY[family].endpoints
        planner.numbers[family].reserve(
            {int.from_bytes(element.key[:4], ORDER) for element in image.broken if element.spec == spec}
        )
