"""Services and EndpointSlices of one tenant to service ports.

`compile_service` is the whole of it as a pure function: one Service, its slices and a policy give its service ports.
`Compiler` is the same thing kept up to date: an event costs work for the one Service it concerns, whatever the tenant
holds, and after any sequence of events the result is, byte for byte, what compiling everything anew gives.

The work is cut where its inputs are: `frame` reads a Service (all but endpoints), `pack_slice` reads a slice, each
once, when the object arrives; what is kept are those two compact forms, never the decoded objects. Compiling joins
them. Where the guard refuses a value, the rest of its object goes on; where an object makes no sense as a whole, its
last good form stays. Endpoints are judged by what the super cluster says of their addresses (screen.py); when that
changes, `reconsider` compiles the services concerned again, and no slice has to be read for it.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Literal, NamedTuple

import msgspec

from vcproxy.brain.frames import aliased, frame
from vcproxy.brain.guard import BACKEND_REASONS, CURES, Policy, Reason, Refusal, Refusals, Unusable
from vcproxy.brain.screen import Rights, Screen
from vcproxy.brain.slices import PackedSlice, join, pack_slice
from vcproxy.brain.vouched import Aliases
from vcproxy.kube import shapes
from vcproxy.kube.errors import ShapeError
from vcproxy.model.services import FrontendKind, PortKey, ServicePort

MAX_RECORDED = 10_000
"""Objects of one tenant whose refusals are kept; a tenant can have more bad objects than anybody reads about."""

Kind = Literal["Service", "EndpointSlice"]
Key = tuple[str, str]
Compilable = shapes.Service | shapes.EndpointSlice


class _Frame(NamedTuple):
    """A Service but for its endpoints; `uid` is that of the object."""

    uid: str
    ports: tuple[ServicePort, ...]


class Change(NamedTuple):
    """Service ports that are now so, and those that are gone. Ports in `put` may equal what they were."""

    put: list[ServicePort]
    removed: list[PortKey]


class Compiled(NamedTuple):
    """What one Service compiles to, and what of it and of its slices was refused."""

    ports: tuple[ServicePort, ...]
    refusals: tuple[Refusal, ...]


def compile_service(
    service: shapes.Service, slices: Iterable[shapes.EndpointSlice], policy: Policy, rights: Rights | None = None
) -> Compiled:
    """One Service with all the slices that name it (others are skipped). Raises Unusable.

    `rights`: says which endpoint addresses are the tenant's; None: all.
    """
    namespace, name = service.key
    refusals = Refusals("Service", namespace, name, service.metadata.uid)
    ports = frame(service, policy, refusals)
    said = list(refusals.records())
    packed: list[PackedSlice] = []
    for found in slices:
        refusals = Refusals("EndpointSlice", *found.key, found.metadata.uid)
        held = pack_slice(found, refusals)
        if held is not None and (found.key[0], held.service) == service.key:
            said.extend(refusals.records())
            if rights is not None:
                screen = Screen(rights, {found.key: held}.get)
                said.extend(screen.put(found.key, held, found.metadata.uid))
                held = screen.admitted(found.key, held)
            packed.append(held)
    return Compiled(tuple(assemble(ports, packed)), tuple(said))


def assemble(frames: Iterable[ServicePort], slices: Iterable[PackedSlice]) -> Iterator[ServicePort]:
    """The service ports of a Service's frame, with their endpoints."""
    held = tuple(slices)
    for port in frames:
        families = sorted({frontend.family for frontend in port.frontends})
        endpoints4, endpoints6, hint_sets = join(port.key.port, port.key.protocol, held, families)
        yield msgspec.structs.replace(port, endpoints4=endpoints4, endpoints6=endpoints6, hint_sets=hint_sets)


class Compiler:
    """One tenant's Services and EndpointSlices, compiled incrementally. Not thread-safe, never blocks.

    `put`, `delete` and `malformed` read one object into memory, `flush` compiles what that made dirty. Nothing comes
    out before both kinds are `listed`: half of the objects would be a wrong, not an old, state.

    `rights` says which endpoint addresses are the tenant's; None: all are. When it has changed its mind about some,
    call `reconsider`.

    Limits hold what is kept: a new Service or a slice beyond them is refused and the last good form of it stays. When
    later removals make room, `starved` says that a new list is worth asking for. `noticed` gets each new refusal.

    `aliases` may change at any time; whoever changes them calls `touch`.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        rights: Rights | None = None,
        aliases: Aliases | None = None,
        noticed: Callable[[Refusal], None] = lambda refusal: None,
    ) -> None:
        self._policy = policy
        self._screen = Screen(rights, self._held) if rights is not None else None
        self._aliases = aliases if aliases is not None else Aliases()
        self._noticed = noticed
        self._frames: dict[Key, _Frame] = {}
        self._virtual: dict[bytes, int] = {}  # the tenant's own virtual addresses, by how many Services have them
        self._slices: dict[Key, dict[str, PackedSlice]] = {}  # of a Service, by the slices' names
        self._service_of: dict[Key, Key] = {}  # of a slice
        self._emitted: dict[Key, tuple[PortKey, ...]] = {}
        self._refusals: dict[tuple[str, Key], tuple[Refusal, ...]] = {}
        # First come, first compiled; the beginning of a plain dict gets ever farther away as it is emptied from there.
        self._dirty: OrderedDict[Key, None] = OrderedDict()
        self._listed: set[Kind] = set()
        self._weight = 0
        self._over = 0  # objects refused for the limits
        self._room = False

    @property
    def ready(self) -> bool:
        """Both kinds have been listed."""
        return len(self._listed) == 2

    @property
    def clean(self) -> bool:
        """Everything taken has been compiled."""
        return not self._dirty

    @property
    def starved(self) -> bool:
        """Objects were refused for the limits, and something was removed since."""
        return self._room and self._over > 0

    @property
    def degraded(self) -> bool:
        """Objects are refused for the limits: what is compiled is not all there is."""
        return self._over > 0

    def refusals(self) -> Iterator[Refusal]:
        """Everything refused of the objects as they are now."""
        for records in self._refusals.values():
            yield from records

    def refuses(self, refusal: Refusal) -> bool:
        """Whether this is (still) refused."""
        return refusal in self._refusals.get((refusal.kind, (refusal.namespace, refusal.name)), ())

    def explain(self, namespace: str, name: str) -> tuple[Refusal, ...]:
        """What was refused of one Service and its slices."""
        found = list(self._refusals.get(("Service", (namespace, name)), ()))
        for held in self._slices.get((namespace, name), ()):
            found.extend(self._refusals.get(("EndpointSlice", (namespace, held)), ()))
        return tuple(found)

    def given(self, namespace: str, name: str) -> list[bytes]:
        """Further virtual addresses that one Service has from outside of its API."""
        held = self._frames.get((namespace, name))
        return self._alias((namespace, name), held.uid) if held is not None else []

    def denied(self, namespace: str, name: str) -> Iterator[tuple[str, bytes, Reason]]:
        """Each endpoint of one Service that may not be used: its slice, its address (4 or 16 octets), and why."""
        if self._screen is None:
            return
        for held, packed in self._slices.get((namespace, name), {}).items():
            for address, reason in self._screen.refused((namespace, held), packed).items():
                yield held, address, reason

    def keys(self, kind: Kind) -> list[Key]:
        """Objects of which anything is held."""
        held = self._frames if kind == "Service" else self._service_of
        return [*held, *(key for said, key in self._refusals if said == kind and key not in held)]

    def emitted(self) -> set[PortKey]:
        """The service ports that all changes so far add up to."""
        return {key for keys in self._emitted.values() for key in keys}

    def listed(self, kind: Kind) -> None:
        """All objects of this kind have been taken once."""
        self._listed.add(kind)

    def put(self, found: Compilable) -> None:
        """One object is now so."""
        if isinstance(found, shapes.Service):
            self._put_service(found)
        else:
            self._put_slice(found)

    def touch(self, keys: Iterable[Key]) -> None:
        """The aliases of these Services have changed."""
        for key in keys:
            if key in self._frames:
                self._dirty[key] = None

    def delete(self, kind: Kind, key: Key) -> None:
        """One object is gone; an unknown one is no error."""
        self._note(kind, key, ())
        if kind == "Service":
            old = self._frames.pop(key, None)
            if old is not None:
                self._room = True
                self._dirty[key] = None
                self._count_virtual(old.ports, ())
        else:
            self._drop_slice(key)

    def malformed(self, kind: Kind, error: ShapeError) -> None:
        """One object could not be read; what is held of it stays."""
        if error.key is None:
            return
        record = Refusal(kind, *error.key, error.field, Reason.MALFORMED, error.reason, cure=CURES[Reason.MALFORMED])
        self._note(kind, error.key, (record,))

    def reconsider(self, addresses: Collection[bytes]) -> Change:
        """The right to these addresses has changed: compile what leads there, at once and before all that is dirty.

        A right that is lost does not wait for its tenant's other changes, of which there may be a flood.
        """
        change = Change([], [])
        if self._screen is None:
            return change
        touched: dict[Key, None] = {}
        for key in sorted(self._screen.slices(addresses)):
            service = self._service_of[key]
            held = self._slices[service][key[1]]
            old = self._refusals.get(("EndpointSlice", key), ())
            said, other = self._judge_again(key, held, next((record.uid for record in old), ""))
            self._note("EndpointSlice", key, (*(one for one in old if one.reason not in BACKEND_REASONS), *said))
            if other or service in self._dirty:
                touched[service] = None
        for service in touched:
            if self.ready:
                self._dirty.pop(service, None)
                self._compile(service, change)
            else:
                self._dirty[service] = None
        return change

    def flush(self, enough: Callable[[], bool] = lambda: False) -> Change:
        """Compile what is dirty; `enough` is asked after each Service whether to leave the rest for the next call."""
        change = Change([], [])
        if not self.ready:
            return change
        while self._dirty:
            key, _ = self._dirty.popitem(last=False)
            self._compile(key, change)
            if enough():
                break
        return change

    def _compile(self, key: Key, change: Change) -> None:
        slices: Iterable[PackedSlice] = self._slices.get(key, {}).values()
        if self._screen is not None:
            slices = [self._screen.admitted((key[0], name), held) for name, held in self._slices.get(key, {}).items()]
        framed = self._frames.get(key)
        frames = aliased(framed.ports, self._alias(key, framed.uid)) if framed is not None else ()
        ports = tuple(assemble(frames, slices))
        now = tuple(port.key for port in ports)
        change.put.extend(ports)
        change.removed.extend(old for old in self._emitted.get(key, ()) if old not in now)
        if now:
            self._emitted[key] = now
        else:
            self._emitted.pop(key, None)

    def _put_service(self, found: shapes.Service) -> None:
        key = found.key
        refusals = Refusals("Service", *key, found.metadata.uid)
        limits = self._policy.limits
        if limits is not None and key not in self._frames and len(self._frames) >= limits.services:
            refusals.add("metadata", Reason.LIMIT, f"more than {limits.services} services")
            self._note("Service", key, refusals.records())
            return
        try:
            ports = frame(found, self._policy, refusals)
        except Unusable as error:
            refusals.add(error.field, Reason.MALFORMED, error.value, cure=error.cure)
            self._note("Service", key, refusals.records())
            return
        self._note("Service", key, refusals.records())
        old, new = self._frames.get(key), _Frame(found.metadata.uid, ports)
        if old != new:
            self._frames[key] = new
            self._dirty[key] = None
            self._count_virtual(old.ports if old is not None else (), ports)

    def _alias(self, key: Key, uid: str) -> list[bytes]:
        return [address for address in self._aliases.addresses(key, uid) if address not in self._virtual]

    def _count_virtual(self, old: tuple[ServicePort, ...], new: tuple[ServicePort, ...]) -> None:
        """A Service's own virtual addresses have changed; who had one of them as an alias is compiled again."""
        before, after = virtual_addresses(old), virtual_addresses(new)
        for address in before ^ after:
            count = self._virtual.get(address, 0) + (1 if address in after else -1)
            if count:
                self._virtual[address] = count
            else:
                del self._virtual[address]
            self.touch(self._aliases.claimants(address))

    def _put_slice(self, found: shapes.EndpointSlice) -> None:
        key = found.key
        uid = found.metadata.uid
        refusals = Refusals("EndpointSlice", *key, uid)
        packed = pack_slice(found, refusals)
        if packed is None:
            self.delete("EndpointSlice", key)
            return
        service = (key[0], packed.service)
        old_service = self._service_of.get(key)
        old = self._slices[old_service].get(key[1]) if old_service is not None else None
        if old == packed:
            screened, other = self._judge_again(key, packed, uid)
            if other:
                self._dirty[service] = None
            self._note("EndpointSlice", key, refusals.records() + screened)
            return
        if over := self._over_limit(service, packed, old, old_service):
            refusals.add("endpoints", Reason.LIMIT, over)
            self._note("EndpointSlice", key, refusals.records())
            return
        if old_service is not None and old_service != service:
            self._drop_slice(key)
            old = None
        screened = self._screen.put(key, packed, uid) if self._screen is not None else ()
        self._note("EndpointSlice", key, refusals.records() + screened)
        self._weight += packed.weight - (old.weight if old else 0)
        self._slices.setdefault(service, {})[key[1]] = packed
        self._service_of[key] = service
        self._dirty[service] = None

    def _judge_again(self, key: Key, held: PackedSlice, uid: str) -> tuple[tuple[Refusal, ...], bool]:
        """What is refused of a slice that has not changed, and whether other endpoints may be used than before."""
        if self._screen is None:
            return (), False
        before = self._screen.admitted(key, held)
        refused = self._screen.judge(key, held, uid)
        return refused, self._screen.admitted(key, held) != before

    def _held(self, key: Key) -> PackedSlice | None:
        service = self._service_of.get(key)
        return self._slices[service][key[1]] if service is not None else None

    def _over_limit(
        self, service: Key, packed: PackedSlice, old: PackedSlice | None, old_service: Key | None
    ) -> str | None:
        """Which limit a slice would break; one that shrinks breaks none."""
        limits, replaced = self._policy.limits, old.weight if old else 0
        if limits is None or packed.weight <= replaced:
            return None
        if self._weight - replaced + packed.weight > limits.endpoints:
            return f"more than {limits.endpoints} endpoints"
        held = sum(other.weight for other in self._slices.get(service, {}).values())
        held -= replaced if old_service == service else 0
        if held + packed.weight > limits.endpoints_per_service:
            return f"more than {limits.endpoints_per_service} endpoints of one service"
        return None

    def _drop_slice(self, key: Key) -> None:
        service = self._service_of.pop(key, None)
        if service is None:
            return
        held = self._slices[service]
        gone = held.pop(key[1])
        self._weight -= gone.weight
        if self._screen is not None:
            self._screen.drop(key)
        if not held:
            del self._slices[service]
        self._room = True
        self._dirty[service] = None

    def _note(self, kind: Kind, key: Key, records: tuple[Refusal, ...]) -> None:
        """Remember what is refused of one object, in place of what was."""
        old = self._refusals.pop((kind, key), ())
        if len(self._refusals) >= MAX_RECORDED:
            records = ()
        self._over += _limited(records) - _limited(old)
        if records:
            self._refusals[kind, key] = records
        for record in records:
            if record not in old:
                self._noticed(record)


def _limited(records: tuple[Refusal, ...]) -> int:
    return any(record.reason is Reason.LIMIT for record in records)


def virtual_addresses(ports: Iterable[ServicePort]) -> set[bytes]:
    """ClusterIPs that these ports answer on, aliases among them."""
    return {
        frontend.address for port in ports for frontend in port.frontends if frontend.kind is FrontendKind.CLUSTER_IP
    }
