"""How the agent is doing: what is committed per tenant, what fails and since when. The data behind health and status.

Health is about the node, and one tenant must not decide it: an update that is refused again and again while the backend
serves others is that tenant's trouble, shown in `status` and counted in metrics, and no reason to take the node out of
a load balancer or to restart the agent. An update that was never tried, a duty of the node itself, a call that does not
return, or failures with no success in between, are the node's trouble.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import msgspec

from vcproxy.model.addresses import Prefix
from vcproxy.model.services import PortKey
from vcproxy.model.tenant import SUPER_UID
from vcproxy.node import proxymetrics
from vcproxy.node.holdings import Extent
from vcproxy.node.localpolicy import LocalPort, LocalPorts, Unserved
from vcproxy.node.pending import Task
from vcproxy.node.worker import Done
from vcproxy.ops import metrics


class TenantState(msgspec.Struct):
    """One tenant as this run of the agent has programmed it. Mutable, owned by the agent.

    `begun`: its first task was queued. `loading`: a first load in chunks is under way. `virtual_ranges`: as last
    programmed, None before. `rejected`: the ports in quarantine, with why. `failing_since`: by the agent's clock.
    `committed_at`: Unix seconds. `microseconds`: that the last commit took in the worker.
    """

    name: str = ""
    begun: bool = False
    loading: bool = False
    virtual_ranges: tuple[Prefix, ...] | None = None
    rejected: dict[PortKey, str] = msgspec.field(default_factory=dict)
    error: str = ""
    failing_since: float | None = None
    revision: int | None = None
    brain: str = ""
    digest: bytes = b""
    committed_at: float = 0.0
    microseconds: int = 0


class Progress:
    """What was achieved and what not. All times are by `clock` (seconds, monotonic) unless said otherwise."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.tenants: dict[str, TenantState] = {}
        self.local = LocalPorts()
        self._unserved: Mapping[Unserved, int] | None = None  # as last shown
        self.problems: tuple[str, ...] = ()
        self.duty_errors: dict[str, str] = {}
        self.brain = ""
        self.disconnect_reason = "not connected yet"
        self.last_success = clock()
        self._calling: tuple[str, float] | None = None
        self._born = time.time()

    @contextlib.contextmanager
    def busy(self, name: str, task: Task) -> Iterator[None]:
        """The backend works at this task while the context is open."""
        self._calling = (name, task.queued_at)
        if of_super := name == SUPER_UID:
            proxymetrics.took_up()
        began, full = time.perf_counter(), task.everything or self._loading(name)
        try:
            yield
        finally:
            self._calling = None
            if of_super:
                proxymetrics.tried(time.perf_counter() - began, full=full)

    def _loading(self, uid: str) -> bool:
        state = self.tenants.get(uid)
        return state is not None and state.loading

    def seen(self, change: Extent) -> None:
        """The brain told a change of the super cluster."""
        proxymetrics.seen(change)

    def queued(self, uid: str) -> None:
        """Something of the tenant is to be programmed."""
        if uid == SUPER_UID:
            proxymetrics.queued()

    def succeeded(self) -> None:
        """The backend did what it was asked."""
        self.last_success = self._clock()

    @property
    def since_success(self) -> float:
        """Seconds since the backend last did what it was asked."""
        return self._clock() - self.last_success

    def connected(self, brain: str) -> None:
        """A stream stands."""
        self.brain, self.disconnect_reason = brain, ""
        metrics.CONNECTED.set(1)

    def disconnected(self, reason: str) -> None:
        """It is down."""
        self.brain, self.disconnect_reason = "", reason
        metrics.CONNECTED.set(0)

    def duty_failed(self, duty: str, error: str, *, cleanup: bool = False) -> None:
        """A duty of the node failed; `cleanup`: one that removes what nobody wants."""
        self.duty_errors[duty] = error
        (proxymetrics.cleanup_failed if cleanup else proxymetrics.sync_failed)()

    def removal_failed(self) -> None:
        """A tenant that is gone could not be removed."""
        proxymetrics.cleanup_failed()

    def duty_done(self, duty: str) -> None:
        """It is well."""
        self.duty_errors.pop(duty, None)

    def applied(self, uid: str, task: Task, done: Done, tried: Collection[PortKey] | None) -> None:
        """A backend call programmed (a chunk of) a task: the ports `tried`, None: all."""
        metrics.OPERATIONS.inc(done.applied.operations)
        self.note_local(uid, done.local, tried)
        timing = task.timing
        if timing is not None and timing.received:  # by the brain's clock, which no tenant sets
            metrics.PROPAGATION.observe(max(time.time() - timing.received / 1e9, 0))
        if uid != SUPER_UID:
            return
        proxymetrics.reconciled(done.applied.reconciled)
        # As kube-proxy does: what changed before this process started says nothing about its speed.
        if timing is not None and timing.event / 1e9 >= self._born:
            proxymetrics.programmed(done.families, timing.event)

    def note_local(self, uid: str, found: tuple[LocalPort, ...], tried: Collection[PortKey] | None) -> None:
        """Of the ports `tried` (None: all) these have a Local policy, and are programmed so."""
        self.local.update(uid, found, tried=tried, refused=self._rejected(uid))
        if uid == SUPER_UID and self._unserved != (unserved := self.local.unserved(uid)):
            self._unserved = dict(unserved)
            proxymetrics.unserved(unserved)

    def _rejected(self, uid: str) -> Collection[PortKey]:
        state = self.tenants.get(uid)
        return state.rejected if state else ()

    def committed(
        self, uid: str, state: TenantState, task: Task, *, revision: int, brain: str, digest: bytes, done: Done | None
    ) -> None:
        """A revision is programmed as a whole; `done` None: it already was."""
        state.revision, state.brain, state.digest, state.committed_at = revision, brain, digest, time.time()
        metrics.REJECTED.labels(uid).set(len(state.rejected))
        if uid == SUPER_UID:
            proxymetrics.synced()
        if done is None:
            return
        state.microseconds = round((done.resolve_seconds + done.apply_seconds) * 1e6)
        metrics.COMMITTED.labels(uid).inc()
        metrics.COMMIT.observe(self._clock() - task.queued_at)

    def failed(self, uid: str, error: str) -> None:
        """A tenant's update failed."""
        metrics.FAILURES.labels(uid).inc()
        if uid == SUPER_UID:
            proxymetrics.sync_failed()
        state = self.tenants.get(uid)
        if state is not None:
            state.error = error
            if state.failing_since is None:
                state.failing_since = self._clock()

    def forget(self, uid: str) -> TenantState | None:
        """The tenant is gone, and so are its metrics."""
        for metric in (metrics.COMMITTED, metrics.REJECTED, metrics.FAILURES):
            with contextlib.suppress(KeyError):
                metric.remove(uid)
        self.local.forget(uid)
        return self.tenants.pop(uid, None)

    def late(self, waiting: Iterable[tuple[str, Task]], timeout: float) -> dict[str, float]:
        """What makes the node unhealthy: name of the tenant or duty -> seconds since it was queued."""
        now = self._clock()
        queued = [(name, task.queued_at) for name, task in waiting if not self._alone(name, task)]
        if self._calling is not None:
            queued.append(self._calling)
        return {name: now - at for name, at in queued if now - at >= timeout}

    def _alone(self, uid: str, task: Task) -> bool:
        """True if the tenant fails while the backend serves others."""
        state = self.tenants.get(uid)
        if state is None or state.failing_since is None or not task.attempts:
            return False
        return self.last_success > state.failing_since
