"""What an update changes in the kernel: net effects per element, written out as transactions.

A plan may touch an element more than once (a port gives up an address that another one takes). What counts is what was
there before the plan and what shall be there after it, so that is all that is kept; an element whose value ends as it
began costs nothing.

Targets of pools are kept as whole pools, before and after, because a first load is a million of them: these are laid
out by numpy, never touched one by one.

Transactions: one, unless the plan is larger than `LIMIT` operations. Then targets are added before the frontends that
expose them and removed behind them, so that each transaction leaves a working state.

A packet that is on its way through the hooks while a transaction takes effect is decided half by what was and half by
what is. Mostly that is harmless (see `table`), but not where a frontend that lives on is led elsewhere, as a traffic
policy does: what the packet was told before (a pool, to be masqueraded, whom the firewall lets in) must still be there
for the rest of its way, some microseconds. So then what only the old way needs is removed by a transaction of its own,
right behind. Rejected: waiting for the packets (synchronize_rcu, tens of milliseconds at each such change).
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vcproxy_nftables.batch import Batch
from vcproxy_nftables.elements import MapSpec, Matrix
from vcproxy_nftables.pools import expand, slot_changes
from vcproxy_nftables.specs import AFFINE, COMMENTED, FAMILY, PORT, WANTED, number, target_value

LIMIT = 100_000

_EXCEPTIONS = frozenset(spec for ports in PORT.values() for spec in (ports.public_outside, ports.nodeports_outside))
_LEADS = _EXCEPTIONS | {spec for ports in PORT.values() for spec in (ports.frontends, ports.public, ports.nodeports)}
_PASSED = frozenset(
    spec for ports in PORT.values() for spec in (ports.allowed, ports.masquerade, ports.nodeports_masquerade)
)
_TARGET_SPECS = frozenset((*AFFINE, *(specs.endpoints for specs in FAMILY.values())))
_ORDER = {spec: rank for rank, spec in enumerate((*WANTED, *(specs.endpoints for specs in FAMILY.values())))}

Value = bytes | None
"""An element's data, None if there is none. Sets: b"". COMMENTED: data, then the comment. Verdict maps: nft's words."""


class Element(NamedTuple):
    """One element as planned. Sets of ranges: `key` is first and last key, joined."""

    spec: MapSpec
    key: bytes
    value: bytes


class _Run(NamedTuple):
    """Operations of one kind on one map."""

    spec: MapSpec
    removed: list[bytes]
    replaced: list[tuple[bytes, bytes]]
    added: list[tuple[bytes, bytes]]

    @property
    def stays_for_packets_on_their_way(self) -> bool:
        """Whether what is removed is removed last. Not ranges beside new ones: the kernel refuses a range that lies in
        one that is still there (EEXIST, nft_pipapo_insert), and a firewall that narrows must not wait for anything.
        """
        return self.spec in _PASSED and not (self.spec.ranges and self.added)


class Changes:
    """Net changes, and what they cost. `operations` counts elements added plus elements removed."""

    def __init__(self) -> None:
        self._elements: dict[MapSpec, dict[bytes, tuple[Value, Value]]] = {}
        self._pools: dict[int, dict[int, tuple[bytes, bytes]]] = {4: {}, 6: {}}

    def set(self, spec: MapSpec, key: bytes, before: Value, after: Value) -> None:
        """An element was `before` and shall be `after`. Of an element noted already, `before` is not heeded."""
        if before == after and key not in self._elements.get(spec, ()):
            return
        held = self._elements.setdefault(spec, {})
        known = held.get(key)
        held[key] = (before if known is None else known[0], after)

    def set_pool(self, family: int, pool: int, before: bytes, after: bytes) -> None:
        """A pool's slots (packed targets) were `before` and shall be `after`; empty: no pool."""
        held = self._pools[family]
        known = held.get(pool)
        held[pool] = (before if known is None else known[0], after)

    def _runs(self) -> list[_Run]:
        runs = []
        for spec in sorted(self._elements, key=_ORDER.__getitem__):
            run = _Run(spec, [], [], [])
            for key, (before, after) in self._elements[spec].items():
                if before == after:
                    continue
                if after is None:
                    run.removed.append(key)
                elif before is None:
                    run.added.append((key, after))
                else:
                    run.replaced.append((key, after))
            if run.removed or run.replaced or run.added:
                runs.append(run)
        return runs

    def transactions(self, new_batch: Callable[[], Batch], *, limit: int = LIMIT) -> list[Batch]:
        """The batches to commit, in this order; none if nothing changes."""
        runs = self._runs()
        pools = [_PoolRun(family, held) for family, held in self._pools.items()]
        size = sum(len(run.removed) + 2 * len(run.replaced) + len(run.added) for run in runs)
        size += sum(run.size for run in pools)
        writer = _Writer(new_batch, limit if size > limit else size + 1)
        for pool_run in pools:
            pool_run.write_additions(writer)
        targets = [run for run in runs if run.spec in _TARGET_SPECS]
        for run in targets:
            writer.replace(run.spec, run.replaced)
            writer.add(run.spec, run.added)
        for run in runs:
            if run.spec not in _TARGET_SPECS:
                if not run.stays_for_packets_on_their_way:
                    writer.remove(run.spec, run.removed)
                writer.replace(run.spec, run.replaced)
                writer.add(run.spec, run.added)
        for run in targets:
            writer.remove(run.spec, run.removed)
        for pool_run in pools:
            writer.remove(pool_run.spec, pool_run.removed)
        if any(run.replaced or run.added or run.spec in _EXCEPTIONS for run in runs if run.spec in _LEADS):
            writer.cut()
        for run in runs:
            if run.stays_for_packets_on_their_way:
                writer.remove(run.spec, run.removed)
        for pool_run in pools:
            pool_run.write_removals(writer)
        return writer.finished()


class _Writer:
    """Fills batches up to a limit of operations."""

    def __init__(self, new_batch: Callable[[], Batch], limit: int) -> None:
        self._new = new_batch
        self._limit = limit
        self._batches: list[Batch] = []

    def _room(self) -> Batch:
        if not self._batches or len(self._batches[-1]) >= self._limit:
            self._batches.append(self._new())
        return self._batches[-1]

    def cut(self) -> None:
        """What follows is another transaction."""
        self._batches.append(self._new())

    def _pieces(self, total: int, weight: int) -> Iterator[tuple[Batch, slice]]:
        start = 0
        while start < total:
            batch = self._room()
            stop = min(total, start + max(1, (self._limit - len(batch)) // weight))
            yield batch, slice(start, stop)
            start = stop

    def finished(self) -> list[Batch]:
        return [batch for batch in self._batches if len(batch)]

    def matrix(self, spec: MapSpec, keys: Matrix, data: Matrix | None) -> None:
        """Add elements, or remove them if there is no data."""
        for batch, piece in self._pieces(len(keys), 1):
            if data is None:
                batch.remove(spec, keys[piece])
            else:
                batch.add(spec, keys[piece], data[piece])

    def remove(self, spec: MapSpec, keys: list[bytes]) -> None:
        for batch, piece in self._pieces(len(keys), 1):
            _remove(batch, spec, keys[piece])

    def add(self, spec: MapSpec, elements: list[tuple[bytes, bytes]]) -> None:
        for batch, piece in self._pieces(len(elements), 1):
            _add(batch, spec, elements[piece])

    def replace(self, spec: MapSpec, elements: list[tuple[bytes, bytes]]) -> None:
        for batch, piece in self._pieces(len(elements), 2):
            _remove(batch, spec, [key for key, _ in elements[piece]])
            _add(batch, spec, elements[piece])


def _remove(batch: Batch, spec: MapSpec, keys: list[bytes]) -> None:
    if spec.ranges:
        batch.remove_interval(spec, *_ends(spec, keys))
    else:
        batch.remove(spec, b"".join(keys))


def _add(batch: Batch, spec: MapSpec, elements: list[tuple[bytes, bytes]]) -> None:
    keys = [key for key, _ in elements]
    if spec.ranges:
        batch.add_interval(spec, *_ends(spec, keys))
        return
    joined, width = b"".join(keys), spec.data_octets
    if spec.verdict:
        batch.add(spec, joined, verdicts=[value.decode() for _, value in elements])
    elif spec in COMMENTED:
        data = b"".join(value[:width] for _, value in elements) if width else None
        batch.add(spec, joined, data, comments=[value[width:].decode() for _, value in elements])
    else:
        batch.add(spec, joined, b"".join(value for _, value in elements) if width else None)


def _ends(spec: MapSpec, keys: list[bytes]) -> tuple[bytes, bytes]:
    width = spec.key_octets
    return b"".join(key[:width] for key in keys), b"".join(key[width:] for key in keys)


class _PoolRun:
    """Changes of one family's pools, sorted into whole pools (numpy) and single slots."""

    def __init__(self, family: int, pools: dict[int, tuple[bytes, bytes]]) -> None:
        self.spec = FAMILY[family].endpoints
        self.width = 6 if family == 4 else 18
        self.new: list[tuple[int, bytes]] = []
        self.gone: list[tuple[int, bytes]] = []
        self.removed: list[bytes] = []
        self.replaced: list[tuple[bytes, bytes]] = []
        self.added: list[tuple[bytes, bytes]] = []
        for pool, (before, after) in pools.items():
            if before == after:
                continue
            if not before:
                self.new.append((pool, expand(after, self.width)))
            elif not after:
                self.gone.append((pool, expand(before, self.width)))
            else:
                self._slots(pool, before, after)
        whole = sum(len(slots) for _, slots in self.new + self.gone) // self.width
        self.size = whole + len(self.removed) + 2 * len(self.replaced) + len(self.added)

    def _slots(self, pool: int, before: bytes, after: bytes) -> None:
        lead = number(pool)
        for slot, old, new in slot_changes(before, after, self.width):
            key = lead + number(slot)
            if not new:
                self.removed.append(key)
            elif old:
                self.replaced.append((key, target_value(new)))
            else:
                self.added.append((key, target_value(new)))

    def write_additions(self, writer: _Writer) -> None:
        if self.new:
            writer.matrix(self.spec, *slot_elements(self.new, self.width))
        writer.replace(self.spec, self.replaced)
        writer.add(self.spec, self.added)

    def write_removals(self, writer: _Writer) -> None:
        """Of whole pools."""
        if self.gone:
            writer.matrix(self.spec, slot_elements(self.gone, self.width)[0], None)


def slot_elements(pools: list[tuple[int, bytes]], width: int) -> tuple[Matrix, Matrix]:
    """Keys u1[n, 8] and data u1[n, width + 2] of all slots of pools, given as (number, expanded slots)."""
    counts = np.fromiter((len(slots) // width for _, slots in pools), np.int64, len(pools))
    keys = slot_keys(np.fromiter((pool for pool, _ in pools), np.uint32, len(pools)), counts)
    data = np.zeros((len(keys), width + 2), np.uint8)
    data[:, :width] = np.frombuffer(b"".join(slots for _, slots in pools), np.uint8).reshape(-1, width)
    return keys, data


def slot_keys(pools: npt.NDArray[np.integer[Any]], counts: npt.NDArray[np.int64]) -> Matrix:
    """Keys u1[n, 8] of as many slots of these pools (by number) as `counts` says, from 0 on."""
    keys = np.empty((int(counts.sum()), 2), np.uint32)
    keys[:, 0] = np.repeat(pools, counts)
    keys[:, 1] = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)
    return keys.view(np.uint8)
