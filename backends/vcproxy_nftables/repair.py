"""Mending: what the table holds against what the mirror wants, element by element. Pure.

The same comparison serves a table that somebody deleted (it holds nothing), one that somebody changed, and one of which
we do not know whether our last transaction was done.
"""

from collections.abc import Iterable, Iterator

from vcproxy.backend.protocol import Drift
from vcproxy.model.services import PortKey
from vcproxy_nftables.adopt import Image
from vcproxy_nftables.changes import Element
from vcproxy_nftables.elements import MapSpec
from vcproxy_nftables.node import Values
from vcproxy_nftables.planned import Plan
from vcproxy_nftables.pools import size_class
from vcproxy_nftables.specs import ATTACHMENT, FAMILY, number
from vcproxy_nftables.state import (
    POOLS,
    WIDTH,
    Tenant,
    affine_elements,
    elements,
    first_of_each,
    range_elements,
    shared,
)


def wanted_elements(tenant: Tenant, node_addresses: frozenset[bytes]) -> Iterator[Element]:
    """All elements that a tenant of the mirror stands for, but its pools' slots."""
    for port in tenant.ports.values():
        for (spec, key), value in first_of_each(elements(port, node_addresses)).items():
            yield Element(spec, key, value)
        for (_, family), pool in zip(POOLS, port.pools, strict=True):
            if pool is not None:
                yield from affine_elements(family, pool)
    for spec, key in (*tenant.counts, *range_elements(tenant, tenant.ranges)):
        yield Element(spec, key, b"")


def difference(
    found: Image,
    tenants: Iterable[Tenant],
    fixed: dict[MapSpec, Values],
    untold: Image,
    node_addresses: frozenset[bytes],
) -> tuple[Plan, Drift]:
    """What turns `found` into what is wanted, and how wrong it was.

    `untold`: what adopted tenants own about which nothing has been said yet; it stays. `fixed`: see adopt.fixed.
    """
    plan = Plan()
    wanted: dict[MapSpec, Values] = {spec: dict(values) for spec, values in fixed.items()}
    pools: dict[int, dict[int, bytes]] = {4: {}, 6: {}}
    for tenant in tenants:
        for spec, key, value in wanted_elements(tenant, node_addresses):
            wanted.setdefault(spec, {})[key] = value
        for port in tenant.ports.values():
            for (_, family), pool in zip(POOLS, port.pools, strict=True):
                if pool is not None:
                    pools[family][pool.number] = pool.slots
                    if pool.seconds:
                        plan.timeouts[family].add(pool.seconds)
    for belongings in untold.owned.values():
        for spec, key, value in belongings.elements:
            wanted.setdefault(spec, {})[key] = value
        for family, pool_number in belongings.pools:
            pools[family][pool_number] = untold.pools[family][pool_number]
    plan.zoning = any(fixed.get(spec) for spec in ATTACHMENT)
    missing = foreign = 0
    for spec, held in found.elements.items():
        values = wanted.get(spec, {})
        for key, value in held.items():
            if values.get(key) != value:
                foreign += 1
                plan.changes.set(spec, key, value, values.get(key))
        for key, value in values.items():
            if key not in held:
                missing += 1
                plan.changes.set(spec, key, None, value)
    for element in found.broken:
        foreign += 1
        plan.changes.set(element.spec, element.key, element.value, None)
    for family, slots_of in pools.items():
        kernel = found.pools[family]
        for pool_number in kernel.keys() | slots_of.keys():
            before, after = kernel.get(pool_number, b""), slots_of.get(pool_number, b"")
            if before != after:
                plan.changes.set_pool(family, pool_number, before, after)
                missing += bool(after)
                foreign += bool(before)
        plan.classes[family].update(size_class(len(slots) // WIDTH[family]) for slots in slots_of.values())
        plan.classes[family].discard(1)
    return plan, Drift(missing=missing, foreign=foreign)


def culprit(name: str, key: bytes, tenant: Tenant, node_addresses: frozenset[bytes]) -> PortKey | None:
    """The tenant's port that wants the element which the kernel refused; None if it is nobody's, or not known whose."""
    if not key:
        return None
    for port in tenant.ports.values():
        for (_, family), pool in zip(POOLS, port.pools, strict=True):
            if pool is None:
                continue
            if name == FAMILY[family].endpoints.name and key[:4] == number(pool.number):
                return port.forwarded.key
            if any(found.spec.name == name and found.key == key for found in affine_elements(family, pool)):
                return port.forwarded.key
        for found in elements(port, node_addresses):
            if found.spec.name == name and found.key.startswith(key):
                return port.forwarded.key
        if any(spec.name == name and held == key for spec, held in shared(port)):
            return port.forwarded.key
    return None
