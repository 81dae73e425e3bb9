"""What the node itself needs of the backend: its facts, the attachments, repair, and sweeping up after earlier runs.

Each is a duty: idempotent, done anew as a whole when something it depends on changed, and with a backoff of its own.
Duties are few and come before the tenants' tasks, which is how a tenant is attached before its first table.

Facts and attachments are full state to a backend, so telling it half of them would undo what an earlier run programmed.
Facts are not touched until the brain (or the last good state) tells them. Attachments of an earlier run are kept until
the brain has named all tenants: the table is newer than the disk (an agent that was killed may have attached a pod
whose placement it had not written yet), so what is remembered adds to them and neither moves nor removes one.
"""

import asyncio
from collections.abc import Callable, Mapping

import msgspec

from vcproxy.backend.protocol import Attachments, Backend, BackendError, NodeState
from vcproxy.model.node import NodeFacts
from vcproxy.node.attachments import QUARANTINE, Names, attach
from vcproxy.node.config import Attachment
from vcproxy.node.holdings import Holdings
from vcproxy.node.nodestate import NodeRules, listen_addresses, node_state
from vcproxy.node.pending import Pending, Task
from vcproxy.node.report import Progress
from vcproxy.node.screen import Denied
from vcproxy.node.worker import Worker
from vcproxy.ops import logs, metrics

REPAIR, NODE, ATTACH, SWEEP = "repair", "node", "attach", "sweep"

# Between two looks for foreign changes after one was mended: a fight with another program must not become a busy loop.
REPAIR_PAUSE = 0.25

log = logs.get("duties")


class Duties:
    """The node's duties and what they depend on. `wake` is called when one is due; `stranger` with a tenant's uid.

    A stranger is a tenant that the backend holds and that is none: neither held nor named by the brain.
    """

    def __init__(
        self,
        *,
        backend: Backend,
        worker: Worker,
        holdings: Holdings,
        progress: Progress,
        attachments: tuple[Attachment, ...],
        rules: NodeRules,
        clock: Callable[[], float],
        wake: Callable[[], None],
        stranger: Callable[[str], None],
    ) -> None:
        self._backend = backend
        self._worker = worker
        self._holdings = holdings
        self._progress = progress
        self._config = attachments
        self._rules = rules
        self._clock = clock
        self._wake = wake
        self._stranger = stranger
        self.pending = Pending()

        self.facts: NodeFacts | None = None
        self.placement: Mapping[bytes, str] | None = None
        self.attached: Attachments | None = None
        self._links: frozenset[str] = frozenset()
        self._local_addresses: frozenset[bytes] = frozenset()
        self._named: frozenset[str] | None = None
        self._earlier: Attachments | None = Attachments()
        self._node_state: NodeState | None = None
        self._with_devices: frozenset[str] = frozenset()
        self._gone: dict[str, Names] = {}
        self._known_bad = False
        self._watched = -1

    # What they depend on.

    def begin(
        self, earlier: Attachments, facts: NodeFacts | None, placement: Mapping[bytes, str] | None, fileno: int
    ) -> None:
        """The backend is open, has the attachments of an `earlier` run, and announces foreign changes on `fileno`.

        `facts` and `placement` are the last good ones, None if there are none.
        """
        self._earlier = earlier
        self.placement = placement
        if facts is not None:
            self.learn(facts)
        self.attend(ATTACH)
        self._watch(fileno)

    def learn(self, facts: NodeFacts) -> None:
        """The brain told these facts of the node.

        A Node object that is gone says nothing, and what is programmed goes on as it is until there is one again.
        """
        if (known := self.facts) is not None and not (facts.zone or facts.addresses or facts.pod_ranges):
            log.warning("there is no Node object of this node; its last zone, addresses and podCIDRs stay in use")
            facts = msgspec.structs.replace(
                facts, zone=known.zone, addresses=known.addresses, pod_ranges=known.pod_ranges
            )
        if facts != self.facts:
            if self.facts is not None and facts.eligible != self.facts.eligible:
                log.info("load balancers are told of the Node's fate by /healthz", eligible=facts.eligible)
            self.facts = facts
            self.attend(NODE)
            self.attend(ATTACH)

    def place(self, placement: Mapping[bytes, str]) -> None:
        """The brain told this placement."""
        self.placement = dict(placement)
        self.attend(ATTACH)

    def see_links(self, names: frozenset[str], addresses: frozenset[bytes]) -> None:
        """The node's devices, and the addresses on them, are these now."""
        if names != self._links:
            self._links = names
            self.attend(ATTACH)
        if addresses != self._local_addresses:
            self._local_addresses = addresses
            self.attend(NODE)

    @property
    def node_addresses(self) -> frozenset[bytes]:
        """All that are this node's, by its Node object and by the kernel."""
        return self._local_addresses.union(self.facts.addresses if self.facts else ())

    def denied(self, uid: str) -> Denied:
        """Where the tenant's endpoints may not be."""
        rules, attached = self._rules, self.attached or Attachments()
        own_network = uid in self._with_devices
        return Denied(
            nodes=self.node_addresses if rules.deny_nodes else frozenset(),
            pods={} if own_network or not rules.deny_other_pods else attached.addresses,
        )

    def name_all(self, uids: frozenset[str] | None) -> None:
        """The brain named all tenants of this node; None: the connection on which it did is down."""
        self._named = uids
        if uids is not None:
            self._earlier = None
            self.attend(SWEEP)
            self.attend(ATTACH)

    def leave(self, tenant: Names) -> None:
        """The tenant is gone; its devices may still be there."""
        self._gone[tenant.uid] = tenant

    @property
    def informed(self) -> bool:
        """True if there is something to go by: the brain named all tenants, or the last good state was there."""
        return self._named is not None or self.facts is not None

    # Doing them.

    def attend(self, duty: str) -> None:
        """The duty is due."""
        self.pending.add(duty, Task(queued_at=self._clock()))
        self._wake()

    async def do(self, name: str, task: Task) -> None:
        """Do a duty; a failure is logged and tried again later."""
        act = {REPAIR: self._repair, NODE: self._set_node, ATTACH: self._attach, SWEEP: self._sweep}[name]
        try:
            with self._progress.busy(name, task):
                await act()
        except Exception as error:
            delay = self.pending.failed(name, task, self._clock())
            self._progress.duty_failed(name, str(error), cleanup=name == SWEEP)
            unexpected = None if isinstance(error, BackendError) else error
            log.error("a duty failed; retrying", duty=name, error=str(error), retry_in=delay, exc_info=unexpected)
        else:
            self._progress.duty_done(name)

    def close(self) -> None:
        """Await no announcements any more."""
        self._watch(-1)

    async def _repair(self) -> None:
        known_bad, self._known_bad = self._known_bad, True
        mended = await self._worker.mend(known_bad=known_bad)
        self._known_bad = False
        if mended.drift is None:
            self._watch(mended.fileno)
            return
        drift = mended.drift
        self._progress.succeeded()
        self.pending.schedule(REPAIR, Task(queued_at=self._clock()), self._clock() + REPAIR_PAUSE)
        if drift.missing or drift.foreign or drift.rebuilt:
            metrics.REPAIRS.inc()
            log.warning(
                "somebody else changed what is programmed; mended",
                missing=drift.missing,
                foreign=drift.foreign,
                rebuilt=drift.rebuilt,
            )

    async def _set_node(self) -> None:
        if self.facts is None:
            return  # An earlier run's facts stay until the brain tells them.
        state = node_state(self._rules, self.facts, self._local_addresses)
        if state != self._node_state:
            await self._worker.call(self._backend.set_node, state)
            self._progress.succeeded()
            self._node_state = state
            if self._rules.detector == "NodeCIDR" and state.local_sources is None:
                log.warning("the Node object has no podCIDRs (yet): until it has, no client counts as a local pod")
        self._progress.local.accept_on(listen_addresses(self._rules, state, self._local_addresses))

    async def _attach(self) -> None:
        """Make the attachments right."""
        known = [Names(uid, held.tenant.name) for uid, held in self._holdings.tenants.items()]
        # A tenant that is gone keeps its devices, unless one of the same name has taken its place.
        taken = {names.name for names in known}
        gone = [names for names in self._gone.values() if names.uid not in self._holdings and names.name not in taken]
        attached, problems = attach(
            links=self._links,
            placement=self.placement or {},
            config=self._config,
            tenants=[*known, *gone],
            node_addresses=self.facts.addresses if self.facts else (),
        )
        if self._earlier is not None:
            attached = Attachments(
                {**attached.interfaces, **self._earlier.interfaces}, {**attached.addresses, **self._earlier.addresses}
            )
        if attached != self.attached:
            await self._worker.call(self._backend.attach, attached)
            self._progress.succeeded()
            self.attached = attached
            self._with_devices = frozenset(attached.interfaces.values())
        in_use = set(attached.interfaces.values())
        self._gone = {names.uid: names for names in gone if names.uid in in_use}
        for problem in problems:
            if problem not in self._progress.problems:
                log.error("an attachment cannot be made", problem=problem)
        self._progress.problems = problems

    async def _sweep(self) -> None:
        """Remove what an earlier run left of tenants that are none any more."""
        named = self._named
        if named is None:
            return  # The connection that said so is down; the next one will say it anew.
        programmed = await self._worker.call(self._backend.tenants)
        for uid in programmed - named - set(self._holdings) - {QUARANTINE}:
            self._stranger(uid)

    # Foreign changes.

    def _watch(self, fileno: int) -> None:
        """Await announcements on `fileno`, and no longer on the one before; -1: on none."""
        loop = asyncio.get_running_loop()
        if self._watched >= 0:
            loop.remove_reader(self._watched)
        self._watched = fileno
        if fileno >= 0:
            loop.add_reader(fileno, self._announced)

    def _announced(self) -> None:
        # Readable until the worker drains it, which may be after a long call: don't be woken again until then.
        self._watch(-1)
        self.attend(REPAIR)
