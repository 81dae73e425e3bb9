"""A tenant that never stops changing: what the fault tests keep going while they break things.

A seeded script makes Services appear, change and vanish in every way that concerns a proxy: several EndpointSlices for
each Service, endpoints that become ready, serve or terminate, endpoints in two slices at once, other target ports, other
Service ports, other traffic policies, deletion, and creation anew under the same ClusterIPs.

Every step says how one object shall be, not what to do to it: a step whose answer was lost (the API server froze after
it had read the request) can be followed by any other, and by itself. A step counts when it was accepted as a whole.
"""

from __future__ import annotations

import http.client
import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from e2e.apiclient import ApiClient, ApiError
from e2e.objects import Object, endpoint, endpoint_slice, service, service_port, slice_port
from e2e.polling import eventually
from e2e.world import PORT, PORTS, TARGETS, World
from vcproxy.lab import Pod

ROLES = ("web-1", "web-2", "web-3")
SERVICES = 6
SLICES = 3
"""Of each Service and family, at most."""
PAUSE = 0.02
"""Seconds between two steps."""
BEAT = 0.5
"""Seconds between two signs of life of a tenant that is quiet."""
CONDITIONS = (
    *[{"ready": True}] * 5,
    {"ready": None},
    {"ready": False},
    {"ready": False, "serving": True, "terminating": True},
    {"ready": False, "serving": False, "terminating": True},
)
_FAMILIES = {4: "IPv4", 6: "IPv6"}

Vips = tuple[str, str]


@dataclass(frozen=True)
class Step:
    """How an object shall be: as it is here, or `gone`."""

    object: Object
    gone: bool = False

    @property
    def key(self) -> tuple[str, str]:
        return self.object["kind"], self.object["metadata"]["name"]


@dataclass
class Script:
    """What happens next in a namespace. `vips`: of the roaming Services; `anchor`, of one that never changes, and
    `partly`, of one that always has the endpoint web-1 and others that come and go.
    """

    namespace: str
    pods: dict[str, Pod]
    vips: Sequence[Vips]
    anchor: Vips
    partly: Vips
    marker: Vips
    chance: random.Random
    there: set[str] = field(default_factory=set)
    marks: int = 0

    def beginning(self) -> Iterator[Step]:
        """What there is before anything changes."""
        for name, vips in (("anchor", self.anchor), ("partly", self.partly)):
            yield self._service(name, vips)
            yield from (self._slice(name, family, 0, [("web-1", {"ready": True})]) for family in _FAMILIES)
        for number in range(SERVICES):
            yield self._toggle(number)
            yield self._rewrite(number)

    def step(self) -> Step:
        """A change."""
        number = self.chance.randrange(SERVICES)
        acts = (self._rewrite, self._drop, self._toggle, self._reshape, self._accompany)
        return self.chance.choices(acts, weights=(45, 10, 15, 15, 15))[0](number)

    def mark(self) -> Step:
        """A change after which what is forwarded is as it never was before."""
        self.marks += 1
        return self._service("marker", self.marker, first=1000 + self.marks)

    def _rewrite(self, number: int) -> Step:
        """A slice gets other endpoints, conditions and target ports."""
        chosen = self.chance.sample(ROLES, self.chance.randint(0, len(ROLES)))
        told = [(role, self.chance.choice(CONDITIONS)) for role in chosen]
        target = self.chance.choice(TARGETS)
        return self._slice(f"roaming-{number}", *self._place(), told, target=target)

    def _drop(self, number: int) -> Step:
        """A slice goes."""
        step = self._slice(f"roaming-{number}", *self._place(), [])
        return Step(step.object, gone=True)

    def _toggle(self, number: int) -> Step:
        """A Service goes, its slices stay; or it comes again, with the ClusterIPs it had."""
        name = f"roaming-{number}"
        made = self._service(name, self.vips[number], first=self.chance.randrange(80, 90))
        if name not in self.there:
            self.there.add(name)
            return made
        self.there.discard(name)
        return Step(made.object, gone=True)

    def _reshape(self, number: int) -> Step:
        """A Service gets other ports, one more or one less, and perhaps another policy."""
        name = f"roaming-{number}"
        if name not in self.there:
            return self._toggle(number)
        policy = self.chance.choice(("Cluster", "Cluster", "Local"))
        more = self.chance.random() < 0.5
        return self._service(
            name, self.vips[number], first=self.chance.randrange(80, 90), more=more, internalTrafficPolicy=policy
        )

    def _accompany(self, _: int) -> Step:
        """The endpoint that stays gets other company."""
        told = [
            (role, self.chance.choice(CONDITIONS))
            for role in self.chance.sample(ROLES, self.chance.randint(0, len(ROLES)))
        ]
        return self._slice("partly", self.chance.choice((4, 6)), self.chance.randrange(1, SLICES), told)

    def _place(self) -> tuple[int, int]:
        return self.chance.choice((4, 6)), self.chance.randrange(SLICES)

    def _service(self, name: str, vips: Vips, *, first: int = PORT, more: bool = False, **spec: str) -> Step:
        ports = [service_port(first, name=said, protocol=protocol) for said, protocol, _, _ in PORTS]
        ports += [service_port(first + 10, name="http-more")] if more else []
        return Step(service(name, namespace=self.namespace, ports=ports, cluster_ips=vips, spec=spec))

    def _slice(
        self,
        owner: str,
        family: int,
        number: int,
        told: Sequence[tuple[str, dict[str, bool | None]]],
        *,
        target: int = TARGETS[0],
    ) -> Step:
        made = [
            endpoint(pod.ip4 if family == 4 else pod.ip6, node=pod.node, **conditions)
            for pod, conditions in ((self.pods[role], conditions) for role, conditions in told)
        ]
        ports = [slice_port(target, name=said, protocol=protocol) for said, protocol, _, _ in PORTS]
        ports.append(slice_port(target, name="http-more"))
        name = f"{owner}-{family}-{number}"
        return Step(
            endpoint_slice(
                name, service=owner, namespace=self.namespace, endpoints=made, ports=ports, family=_FAMILIES[family]
            )
        )


class ApiHand:
    """Does steps in an API server. Raises OSError, HTTPException or ApiError."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self._there: set[tuple[str, str]] = set()
        self._beats = 0

    def do(self, step: Step) -> None:
        kind, name = step.key
        if step.gone:
            self._there.discard(step.key)
            _unless(404, lambda: self._client.delete(kind, name, step.object["metadata"]["namespace"]))
            return
        ways = [(409, self._client.create), (404, self._client.update)]
        first, second = reversed(ways) if step.key in self._there else ways
        if not _unless(first[0], lambda: first[1](step.object)):
            second[1](step.object)
        self._there.add(step.key)

    def beat(self, namespace: str) -> None:
        """Have both kinds' watches say something that changes nothing."""
        self._beats += 1
        said = {"metadata": {"annotations": {"beat": str(self._beats)}}}
        for kind, name in (("Service", "anchor"), ("EndpointSlice", "anchor-4-0")):
            self._client.patch(kind, name, said, namespace)

    def close(self) -> None:
        self._client.close()


class FolderHand:
    """Does steps in a folder of manifests."""

    def __init__(self, world: World, tenant: str) -> None:
        self._world, self._tenant = world, tenant
        self._held: dict[tuple[str, str], Object] = {}

    def do(self, step: Step) -> None:
        if step.gone:
            self._held.pop(step.key, None)
        else:
            self._held[step.key] = step.object
        self._world.apply(self._tenant, list(self._held.values()))

    def beat(self, namespace: str) -> None:
        """A folder need not speak."""

    def close(self) -> None:
        self._world.apply(self._tenant, [])


def _unless(status: int, act: object) -> bool:
    """Do it; False if the answer was this status."""
    try:
        act()  # type: ignore[operator]
    except ApiError as error:
        if error.status != status:
            raise
        return False
    return True


class Changer:
    """Runs a script from a thread of its own while the context is open, which it may be several times.

    `changes`: steps that were accepted; `failures`: those that were not, by why. A refusal that has nothing to do with
    an API server that is away is an error of the test, which leaving the context raises.
    """

    def __init__(self, script: Script, hand: ApiHand | FolderHand) -> None:
        self.changes = 0
        self.failures: Counter[str] = Counter()
        self.script = script
        self._hand = hand
        self._error: BaseException | None = None
        self._turn = threading.Lock()
        self._calm = False
        self._over = threading.Event()
        self._thread = threading.Thread()

    def begin(self) -> None:
        """Make what the script begins with."""
        for step in self.script.beginning():
            self._hand.do(step)
        self.mark()

    def close(self) -> None:
        """It is not used any more."""
        self._hand.close()

    def __enter__(self) -> Changer:
        self._over.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.check()

    def check(self) -> None:
        """Raise the error that ended the thread, if one did."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Nothing changes while the context is open. Watches go on to speak: API servers do so once a minute by
        themselves, which is too seldom for a test with less patience.
        """
        with self._turn:
            self._calm = True
        try:
            yield
        finally:
            self._calm = False

    def mark(self) -> None:
        """Within `quiet`: a change that what is forwarded is told by. For as long as the API server needs to be well."""
        step = self.script.mark()

        def done() -> bool:
            try:
                self._hand.do(step)
            except (OSError, http.client.HTTPException, ApiError) as error:
                raise AssertionError(repr(error)) from None
            return True

        eventually(done, within=30, what="a marker is written")

    def _run(self) -> None:
        try:
            while not self._over.wait(BEAT if self._calm else PAUSE):
                with self._turn:
                    self._one()
        except BaseException as error:
            self._error = error

    def _one(self) -> None:
        calm = self._calm
        try:
            if calm:
                self._hand.beat(self.script.namespace)
            else:
                self._hand.do(self.script.step())
        except (OSError, http.client.HTTPException) as error:
            self.failures[type(error).__name__] += 1
        except ApiError as error:
            # A Service whose deletion etcd did not see to the end may leave its address taken for some minutes.
            if error.status < 500 and error.status != 429 and "already allocated" not in str(error):
                raise
            self.failures[f"{error.status} {error.reason}"] += 1
        else:
            self.changes += not calm
