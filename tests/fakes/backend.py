"""A backend in memory: everything the Backend protocol demands, with counted operations and failures on order.

It keeps two copies: `kernel`, what is "programmed" and outlives the object as nftables outlives an agent, and what it
was asked for. A foreign hand may change `kernel` behind its back; `touch` then announces it on the descriptor, and
`repair` mends it from the wanted copy. An operation is one port put or removed, as an element is for the kernel.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vcproxy.backend.protocol import (
    Applied,
    Attachments,
    BackendError,
    Drift,
    NodeState,
    Rejection,
    TenantUpdate,
)
from vcproxy.model.addresses import Prefix
from vcproxy.model.forwarding import ForwardedPort
from vcproxy.model.services import PortKey

Table = dict[PortKey, ForwardedPort]


class Kernel:
    """What stays when the backend object is gone."""

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}
        self.ranges: dict[str, tuple[Prefix, ...]] = {}
        self.attachments = Attachments()
        self.node = NodeState()


class FakeBackend:
    """See the module. `calls` is the order of (method, tenant uid or ""); `operations` counts changes to the kernel."""

    def __init__(self, options: Mapping[str, Any] | None = None, *, kernel: Kernel | None = None) -> None:
        if options:
            raise ValueError(f"unknown options {sorted(options)}")
        self.kernel = kernel or Kernel()
        self.calls: list[tuple[str, str]] = []
        self.updates: list[TenantUpdate] = []
        self.operations = 0
        self.refuse: Callable[[str, PortKey], str] = lambda uid, key: ""
        self.fail: Callable[[str, str], Exception | None] = lambda method, uid: None
        self.gate: Callable[[str, str], None] = lambda method, uid: None
        self._wanted: dict[str, Table] = {}
        self._thread: int | None = None
        self._busy = False
        self._changed = False
        self.opened = False
        self._read, self._write = -1, -1

    def __enter__(self) -> "FakeBackend":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _enter(self, method: str, uid: str = "") -> None:
        """Calls come from one thread, after `open`; a failure on order changes nothing."""
        if self._thread is None:
            self._thread = threading.get_ident()
        assert self._thread == threading.get_ident(), f"{method} called from a second thread"
        assert self.opened or method in ("open", "cleanup"), f"{method} called before open"
        self.calls.append((method, uid))
        self.gate(method, uid)
        error = self.fail(method, uid)
        if error is not None:
            raise error

    def open(self) -> None:
        self._enter("open")
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        self._wanted = {uid: dict(table) for uid, table in self.kernel.tables.items()}
        self.opened = True

    def tenants(self) -> frozenset[str]:
        self._enter("tenants")
        return frozenset(self._wanted)

    def attachments(self) -> Attachments:
        self._enter("attachments")
        return self.kernel.attachments

    def set_node(self, state: NodeState) -> None:
        self._enter("set_node")
        self.operations += self.kernel.node != state
        self.kernel.node = state

    def attach(self, attachments: Attachments) -> None:
        self._enter("attach")
        self.operations += self.kernel.attachments != attachments
        self.kernel.attachments = attachments

    def apply(self, update: TenantUpdate) -> Applied:
        uid = update.uid
        self._enter("apply", uid)
        assert not (update.complete and update.removed), "a complete update removes by leaving out"
        self.updates.append(update)
        wanted = self._wanted.get(uid, {})
        after = {} if update.complete else dict(wanted)
        rejections = []
        for port in update.put:
            if reason := self.refuse(uid, port.key):
                rejections.append(Rejection(port.key, reason))
                if port.key in wanted:
                    after[port.key] = wanted[port.key]
            else:
                after[port.key] = port
        for key in update.removed:
            after.pop(key, None)
        self._wanted[uid] = after
        operations = self._sync(uid) + (self.kernel.ranges.get(uid, ()) != update.virtual_ranges)
        self.kernel.ranges[uid] = update.virtual_ranges
        self.operations += operations
        return Applied(operations, tuple(rejections))

    def remove_tenant(self, uid: str) -> None:
        self._enter("remove_tenant", uid)
        self._wanted.pop(uid, None)
        self.operations += len(self.kernel.tables.pop(uid, {}))
        self.kernel.ranges.pop(uid, None)

    def fileno(self) -> int:
        return self._read

    def drifted(self) -> bool:
        self._enter("drifted")
        try:
            os.read(self._read, 4096)
        except BlockingIOError:
            pass
        changed, self._changed = self._changed, False
        return changed

    def repair(self) -> Drift:
        self._enter("repair")
        rebuilt = not self.kernel.tables and bool(self._wanted)
        missing = foreign = 0
        for uid in [*self._wanted, *self.kernel.tables]:
            table = self.kernel.tables.get(uid, {})
            foreign += sum(key not in self._wanted.get(uid, {}) for key in table)
            operations = self._sync(uid)
            self.operations += operations
            missing += operations
        return Drift(missing - foreign, foreign, rebuilt)

    def dump(self, uid: str | None = None) -> Sequence[Mapping[str, Any]]:
        self._enter("dump")
        return [
            {"tenant": tenant, "port": str(key)}
            for tenant, table in self.kernel.tables.items()
            if uid in (None, tenant)
            for key in table
        ]

    def close(self) -> None:
        if self.opened:
            os.close(self._read)
            os.close(self._write)
            self.opened = False

    def cleanup(self) -> None:
        self._enter("cleanup")
        self.kernel.tables.clear()

    def _sync(self, uid: str) -> int:
        """Make the kernel's table the wanted one; returns how many ports differed."""
        wanted, table = self._wanted.get(uid, {}), self.kernel.tables.get(uid, {})
        operations = sum(table.get(key) != port for key, port in wanted.items()) + len(table.keys() - wanted.keys())
        if uid in self._wanted:
            self.kernel.tables[uid] = dict(wanted)
        else:
            self.kernel.tables.pop(uid, None)
        return operations

    def touch(self, *, foreign: bool = True) -> None:
        """Announce a change on the descriptor: somebody else's, or (as the kernel also does) our own."""
        self._changed = self._changed or foreign
        os.write(self._write, b"!")


def broken(*methods: str, times: int | None = None, uid: str | None = None) -> Callable[[str, str], Exception | None]:
    """For `FakeBackend.fail`: these methods raise BackendError, `times` times (always, if None), for one tenant."""
    left = [times]

    def fail(method: str, tenant: str) -> Exception | None:
        if method not in methods or (uid is not None and tenant != uid) or left[0] == 0:
            return None
        if left[0] is not None:
            left[0] -= 1
        return BackendError(f"{method} fails on order")

    return fail
