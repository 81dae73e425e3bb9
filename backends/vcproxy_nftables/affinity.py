"""Session affinity of pools: for how long clients are bound, and the ids of the targets that they are bound to.

Affinity timeouts are exact to three digits (1 to 999 s, 10800 s, 86400 s ...), rounded up beyond: each distinct one in
use is a chain, and a hostile tenant could otherwise make one for each of 86,400 seconds.

Ids are used again as late as possible: a client that is bound to an endpoint which has left must find nothing there,
not the endpoint that came after it.
"""

from vcproxy_nftables.planned import Plan
from vcproxy_nftables.pools import split
from vcproxy_nftables.specs import FAMILY, affine_value, number, target_value
from vcproxy_nftables.state import WIDTH, Pool, learn_verdict

MAX_TARGET_IDS = 4095
"""Targets of a pool that clients can be bound to; those beyond are balanced only."""


def affinity_class(seconds: int) -> int:
    """The timeout that is programmed for a wanted one: the next with three significant digits."""
    if seconds < 1000:
        return seconds
    step: int = 10 ** (len(str(seconds)) - 3)
    return -(-seconds // step) * step


def bind(plan: Plan, family: int, pool: Pool, seconds: int) -> None:
    """Affinity of a pool: whether clients are bound to its targets, for how long, and the targets' ids."""
    if not seconds and not pool.seconds:
        return
    specs, lead, change = FAMILY[family], number(pool.number), plan.changes.set
    if seconds:
        plan.timeouts[family].add(seconds)
    change(specs.affine_pools, lead, _learns(family, pool.seconds), _learns(family, seconds))
    pool.seconds = seconds
    ids = _target_ids(pool.ids, split(pool.slots, WIDTH[family]) if seconds else [])
    for target in pool.ids.keys() - ids.keys():
        value = affine_value(pool.ids[target], pool.number)
        change(specs.affine_targets, value, target_value(target), None)
        change(specs.affine_ids, lead + target_value(target), value, None)
    for target in ids.keys() - pool.ids.keys():
        value = affine_value(ids[target], pool.number)
        change(specs.affine_targets, value, None, target_value(target))
        change(specs.affine_ids, lead + target_value(target), None, value)
    pool.ids = ids


def _learns(family: int, seconds: int) -> bytes | None:
    return learn_verdict(family, seconds) if seconds else None


def _target_ids(held: dict[bytes, int], wanted: list[bytes]) -> dict[bytes, int]:
    """Ids of the wanted targets: those held, and others for the new ones, each used again as late as possible."""
    ids = {target: held[target] for target in wanted if target in held}
    used = set(held.values())
    candidate = max(used, default=0)
    for target in wanted:
        if target in ids:
            continue
        if len(used) >= MAX_TARGET_IDS:
            used = set(ids.values())  # those of targets that go just now
            if len(used) >= MAX_TARGET_IDS:
                break
        candidate = candidate % MAX_TARGET_IDS + 1
        while candidate in used:
            candidate = candidate % MAX_TARGET_IDS + 1
        ids[target] = candidate
        used.add(candidate)
    return ids
