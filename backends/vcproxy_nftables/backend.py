"""The backend: what the node agent wants, planned in memory and committed to the kernel.

Every call goes the same way: change the mirror (`plan`), make the chains that are missing, commit the net changes, look
at UDP flows. What can go wrong is the commit, and there is one answer to all of it: the mirror says what is wanted, so
read the table, compare, and mend (`repair`). Only when the kernel refuses an element then is the port found that wants
it; it gets its last good form back and is reported.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import msgspec

from vcproxy.backend.protocol import (
    Applied,
    Attachments,
    BackendError,
    Drift,
    NodeState,
    Reconciled,
    Rejection,
    TenantUpdate,
)
from vcproxy.model.forwarding import ForwardedPort
from vcproxy.model.services import PortKey, Protocol
from vcproxy.model.tenant import SUPER_UID
from vcproxy_nftables import adopt, cleaning, listing, node, repair
from vcproxy_nftables.batch import Batch
from vcproxy_nftables.changes import Changes
from vcproxy_nftables.kernel import Kernel
from vcproxy_nftables.plan import Planner
from vcproxy_nftables.planned import Plan
from vcproxy_nftables.specs import TENANTS, zone_value
from vcproxy_nftables.state import Tenant
from vcproxy_nftables.wire import NetlinkError
from vcproxy_nftables.zones import FIRST, LAST, Zones

MAX_REFUSED = 32
"""Ports of one update that the kernel may refuse before the update is given up."""

MAX_AHEAD = 4
"""Pieces that are planned and wait for the kernel: they are memory."""
PIECE = 500
"""Ports of a first load that are planned at a time, while the kernel takes the ones before."""


class NftablesBackend:
    """The default backend: table `inet vcproxy` of the network namespace that `open` is called in.

    Options: `zones: [FIRST, LAST]`, the conntrack zones for tenants (see `zones`).
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Raises ValueError for options that are unknown or ill-typed."""
        self._range = _options(options)
        self._opened: Kernel | None = None
        self._planner = Planner()
        self._zones = Zones(*self._range)
        self._fixed: adopt.Fixed = {}
        self._untold = adopt.Image()
        self._attached: frozenset[str] = frozenset()
        self._flat_zones: frozenset[int] = frozenset()
        self._repair_due = False

    @property
    def _kernel(self) -> Kernel:
        if self._opened is None:
            raise BackendError("the nftables backend is not open")
        return self._opened

    def open(self) -> None:
        """Adopt the table that an earlier run left, or make one. An adopted table is not written to."""
        kernel = Kernel()
        try:
            with _system_errors():
                image = self._take_over(kernel)
        except BaseException:
            kernel.close()
            raise
        self._opened = kernel
        self._planner = Planner()
        self._zones = Zones(*self._range)
        adopt.register(image, self._planner)
        self._zones.reserve(image.zones.values())
        self._fixed = adopt.fixed(image)
        self._untold = image
        self._repair_due = bool(image.orphans)

    @staticmethod
    def _take_over(kernel: Kernel) -> adopt.Image:
        if not kernel.netlink.exists():
            kernel.create_table()
        elif not kernel.is_sound():
            kernel.mend_chains()
        return adopt.read(kernel.netlink)

    def tenants(self) -> frozenset[str]:
        """Uids with state in the table; not those that are only attached."""
        return frozenset(
            tenant.uid for tenant in self._planner.tenants.values() if tenant.adopted or tenant.ports or tenant.ranges
        )

    def attachments(self) -> Attachments:
        """What the table says; an element whose zone no tenant has is left out."""
        return node.attachments_of(self._fixed, {tenant.zone: tenant.uid for tenant in self._planner.tenants.values()})

    def set_node(self, state: NodeState) -> None:
        """Make these the node's facts."""
        plan = Plan()
        node.replace(plan.changes, self._fixed, node.node_elements(state))
        self._planner.accepting = frozenset(state.node_addresses)
        self._planner.set_node_addresses(plan, frozenset(state.own_addresses))
        self._execute(plan)

    def attach(self, attachments: Attachments) -> None:
        """Make these the attachments; a tenant that is new gets its zone."""
        plan = Plan()
        overlay, flat = frozenset(attachments.interfaces.values()), frozenset(attachments.addresses.values())
        self._attached = (overlay | flat) - {SUPER_UID}
        for uid in sorted(self._attached):
            self._tenant(plan.changes, uid)
        for tenant in self._planner.tenants.values():
            was = tenant.overlay
            tenant.overlay = tenant.uid in overlay and tenant.uid != SUPER_UID
            if was != tenant.overlay:
                self._planner.review(plan, tenant)
        zones = {uid: tenant.zone for uid, tenant in self._planner.tenants.items()} | {SUPER_UID: 0}
        wanted = node.attachment_elements(attachments, zones)
        plan.zoning = any(wanted.values())
        node.replace(plan.changes, self._fixed, wanted)
        self._flat_zones = frozenset(zones[uid] for uid in flat)
        self._execute(plan)
        self._retire([tenant for tenant in self._planner.tenants.values() if self._is_idle(tenant)])

    def apply(self, update: TenantUpdate) -> Applied:
        """Program an update. The first one of a tenant that was adopted must be complete."""
        plan = Plan()
        tenant = self._tenant(plan.changes, update.uid)
        if tenant.adopted and not update.complete:
            raise BackendError(
                f"tenant {update.uid}: the table has state of an earlier run; send a complete update first"
            )
        previous: dict[PortKey, ForwardedPort | None] = {}
        for key in (*update.removed, *(port.key for port in update.put)):
            held = tenant.ports.get(key)
            previous[key] = held.forwarded if held else None
        adoption = adopt.Adoption(self._untold, self._planner, tenant, plan) if tenant.adopted else None
        self._planner.set_ranges(plan, tenant, update.virtual_ranges)
        removed: Iterable[PortKey] = update.removed
        if update.complete:
            removed = tenant.ports.keys() - {port.key for port in update.put}
        for key in removed:
            self._planner.remove(plan, tenant, key)
        if adoption is None and len(update.put) > PIECE and not any(previous.values()):
            return self._load(plan, tenant, update.put, previous)
        rejected = self._planner.put(plan, tenant, update.put, hint=adoption.hint if adoption else None)
        if adoption:
            adoption.finish()
        done = self._execute(plan, tenant, previous)
        return msgspec.structs.replace(done, rejections=(*rejected, *done.rejections))

    def _load(
        self,
        plan: Plan,
        tenant: Tenant,
        ports: Sequence[ForwardedPort],
        previous: Mapping[PortKey, ForwardedPort | None],
    ) -> Applied:
        """Program ports that are all new, piece by piece: the kernel needs no interpreter, so a thread of its own
        commits one piece while the next is planned. New ports give nothing up, so the pieces are as good as one."""
        rejected: list[Rejection] = []
        commits: list[Future[int]] = []
        plans: list[Plan] = []
        with ThreadPoolExecutor(1, "commits") as executor:
            for start in range(0, len(ports), PIECE):
                rejected += self._planner.put(plan, tenant, ports[start : start + PIECE])
                batches = plan.changes.transactions(self._kernel.netlink.batch)
                commits.append(executor.submit(self._commit_next, commits[-1:], plan, batches))
                plans.append(plan)
                plan = Plan()
                if len(commits) > MAX_AHEAD:
                    wait([commits[-MAX_AHEAD]])
        done = self._concluded(lambda: sum(commit.result() for commit in commits), plans, tenant, previous)
        return msgspec.structs.replace(done, rejections=(*rejected, *done.rejections))

    def _commit_next(self, before: Sequence[Future[int]], plan: Plan, batches: Sequence[Batch]) -> int:
        """Commit if what was before could be; else fail in the same way."""
        for commit in before:
            commit.result()
        self._kernel.ensure(plan)
        return self._kernel.send(batches)

    def remove_tenant(self, uid: str) -> None:
        """Remove all of a tenant. Its zone is kept for as long as it is attached, and flushed in any case."""
        tenant = self._planner.tenants.get(uid)
        if tenant is None:
            return
        plan = Plan()
        if tenant.adopted:
            adopt.Adoption(self._untold, self._planner, tenant, plan).finish()
        for key in list(tenant.ports):
            self._planner.remove(plan, tenant, key)
        self._planner.set_ranges(plan, tenant, ())
        self._execute(plan)
        if self._is_idle(tenant):
            self._retire([tenant])
        else:
            self._flush(tenant)

    def fileno(self) -> int:
        """Readable when somebody else changed some table of this network namespace."""
        return self._kernel.monitor.fileno()

    def drifted(self) -> bool:
        """True if somebody else changed the table, or an earlier run left something that belongs to nobody."""
        with _system_errors():
            return self._kernel.drifted() or self._repair_due

    def repair(self) -> Drift:
        """Compare the table with the mirror and mend it; rebuild it if it is gone."""
        with _system_errors():
            _, drift = self._mend()
        return drift

    def dump(self, uid: str | None = None) -> Sequence[Mapping[str, Any]]:
        """The table's content as rows; see `listing`."""
        with _system_errors():
            return list(listing.rows(adopt.read(self._kernel.netlink), uid))

    def close(self) -> None:
        """Close the sockets; the table stays."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def cleanup(self) -> None:
        """Remove the table and the flows of all zones that it had given out."""
        self.close()
        cleaning.clean()

    # What all of these share

    def _tenant(self, changes: Changes, uid: str) -> Tenant:
        """A tenant, made known and given a zone if it is new."""
        tenant = self._planner.tenants.get(uid)
        if tenant is None:
            tenant = self._planner.tenants[uid] = Tenant(uid, self._zones.take(uid))
            if tenant.zone:
                key = zone_value(tenant.zone)
                changes.set(TENANTS, key, None, uid.encode())
                self._fixed[TENANTS][key] = uid.encode()
        return tenant

    def _is_idle(self, tenant: Tenant) -> bool:
        return not (tenant.ports or tenant.ranges or tenant.adopted or tenant.uid in self._attached)

    def _flush(self, tenant: Tenant) -> None:
        if tenant.zone:
            with _system_errors():
                self._kernel.conntrack.flush_zone(tenant.zone)

    def _retire(self, tenants: Iterable[Tenant]) -> None:
        """Forget tenants of which nothing is left. First their flows: a zone that the table calls free has none."""
        plan, zones = Plan(), []
        for tenant in tenants:
            self._flush(tenant)
            del self._planner.tenants[tenant.uid]
            if tenant.zone:
                key = zone_value(tenant.zone)
                plan.changes.set(TENANTS, key, tenant.uid.encode(), None)
                del self._fixed[TENANTS][key]
                zones.append(tenant.zone)
        self._execute(plan)
        for zone in zones:
            self._zones.release(zone)

    def _execute(
        self,
        plan: Plan,
        tenant: Tenant | None = None,
        previous: Mapping[PortKey, ForwardedPort | None] | None = None,
    ) -> Applied:
        """Commit a plan; the rejections are the ports that the kernel refused. Raises BackendError."""
        return self._concluded(lambda: self._commit(plan), [plan], tenant, previous or {})

    def _commit(self, plan: Plan) -> int:
        self._kernel.ensure(plan)
        return self._kernel.send(plan.changes.transactions(self._kernel.netlink.batch))

    def _concluded(
        self,
        commit: Callable[[], int],
        plans: Sequence[Plan],
        tenant: Tenant | None,
        previous: Mapping[PortKey, ForwardedPort | None],
    ) -> Applied:
        """Commit plans, and do what is due behind a commit."""
        refused: list[Rejection] = []
        with _system_errors():
            try:
                count = commit()
            except NetlinkError:
                count, refused = self._mend_or_reject(tenant, previous)
            reconciled: list[Reconciled] = []
            for plan in plans:
                for family, number in plan.freed:
                    self._planner.numbers[family].release(number)
                reconciled += self._reconcile(plan)
        return Applied(count, tuple(refused), tuple(reconciled))

    def _mend_or_reject(
        self, tenant: Tenant | None, previous: Mapping[PortKey, ForwardedPort | None]
    ) -> tuple[int, list[Rejection]]:
        refused: dict[PortKey, Rejection] = {}
        while True:
            try:
                return self._mend()[0], list(refused.values())
            except NetlinkError as error:
                key = repair.culprit(error.name, error.key, tenant, self._planner.node_addresses) if tenant else None
                if (
                    tenant is None
                    or key is None
                    or key not in previous
                    or key in refused
                    or len(refused) == MAX_REFUSED
                ):
                    raise
                refused[key] = Rejection(key, f"the kernel refused it: {error}")
                good, undo = previous[key], Plan()
                if good is None:
                    self._planner.remove(undo, tenant, key)
                else:
                    self._planner.put(undo, tenant, [good])

    def _mend(self) -> tuple[int, Drift]:
        kernel = self._kernel
        kernel.drifted()  # what happened up to here is about to be seen
        self._repair_due = True  # until it is done
        missing = not kernel.netlink.exists()
        rebuilt = missing or not kernel.is_sound()
        if missing:
            kernel.create_table()
        elif rebuilt:
            kernel.mend_chains()
        plan, drift = repair.difference(
            adopt.Image() if missing else adopt.read(kernel.netlink),
            (tenant for tenant in self._planner.tenants.values() if not tenant.adopted),
            self._fixed,
            self._untold,
            self._planner.node_addresses,
        )
        count = self._commit(plan)
        self._repair_due = False
        return count, Drift(missing=drift.missing, foreign=drift.foreign, rebuilt=rebuilt)

    def _reconcile(self, plan: Plan) -> Iterator[Reconciled]:
        """End the UDP flows that would go on to targets that are gone, or untranslated; one look for each family."""
        for family in (4, 6):
            flows = {zone: mine for zone, found in plan.flows.items() if (mine := found.of(family))}
            if not flows:
                continue
            started, count = time.perf_counter(), 0
            for zone, mine in flows.items():
                zones = {0} | self._flat_zones if zone == Plan.PUBLIC else {zone}
                count += self._kernel.conntrack.reconcile(zones=zones, protocol=Protocol.UDP, serving=mine)
            yield Reconciled(family, time.perf_counter() - started, count)


def _options(options: Mapping[str, Any]) -> tuple[int, int]:
    if unknown := options.keys() - {"zones"}:
        raise ValueError(f"the nftables backend has no option {', '.join(sorted(map(str, unknown)))}; it has: zones")
    match options.get("zones", [FIRST, LAST]):
        case [int(first), int(last)] if 1 <= first <= last <= 0xFFFF:
            return first, last
        case other:
            raise ValueError(f"option zones of the nftables backend: need [FIRST, LAST] in 1..65535, not {other!r}")


@contextmanager
def _system_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BackendError(f"netfilter netlink: {error}") from error
