"""Service ports to forwarded ports: the choices that only this node can make. Pure, and vectorised over all ports.

The rules are kube-proxy's CategorizeEndpoints (pkg/proxy/topology.go), applied to each IP family on its own:

- Cluster set: the Ready endpoints that the topology hints leave; if there are none, all Serving and Terminating ones.
- Hints count only when every Ready endpoint carries one of the kind and at least one names us: the same node first
  (KEP-3015), else the same zone (KEP-2433), else they are ignored. Endpoints that are not Ready have no say.
- Local set: the Ready endpoints on this node; if there are none, its Serving and Terminating ones. Hints never apply.
- ClusterIPs follow internalTrafficPolicy, the public frontends follow externalTrafficPolicy; a client inside that dials
  a public frontend of a Local policy is short-circuited to the cluster set, as if the load balancer had sent it on.
- No usable endpoint anywhere: reject. A Local policy with usable endpoints on other nodes only: drop, so that a load
  balancer's retry, not an error, decides.

Why numpy over the concatenation of all ports, and not a loop over endpoints: a node that starts resolves a million
endpoints, and a Python loop would need seconds. Every question is a boolean column; a question about a port ("has it a
Ready endpoint?") is how many of the column's true rows lie between the port's bounds, and the same count says where the
port's chosen targets lie once the chosen rows are copied out. The Python that remains is per port. One port costs some
tens of microseconds, a port among many a few.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from vcproxy.model.endpoints import (
    NO_NODE,
    READY,
    SERVING,
    TERMINATING,
    HintSet,
    endpoint_dtype,
    name_id,
    target_dtype,
)
from vcproxy.model.forwarding import Action, ForwardedFrontend, ForwardedPort, Masquerade
from vcproxy.model.services import FrontendKind, Protocol, ServicePort

_Bools = npt.NDArray[np.bool_]
_Counts = npt.NDArray[np.int64]

_CLUSTER, _LOCAL, _DROP, _REJECT = Action.CLUSTER, Action.LOCAL, Action.DROP, Action.REJECT
_CLUSTER_IP = FrontendKind.CLUSTER_IP
_NONLOCAL, _ALWAYS, _HOST = Masquerade.NONLOCAL, Masquerade.ALWAYS, Masquerade.HOST

# What one hint set means to this node.
_HAS_NODES, _NAMES_NODE, _HAS_ZONES, _NAMES_ZONE = 1, 2, 4, 8

# Which pools a port's frontends of one family may use.
_USES_CLUSTER, _USES_LOCAL = 1, 2


class NodeView(msgspec.Struct, frozen=True):
    """Who is resolving: ids as model.endpoints.name_id gives them. `zone_id` 0: the node has no zone."""

    node_id: int
    zone_id: int = NO_NODE

    @classmethod
    def of(cls, node: str, zone: str = "") -> "NodeView":
        """The view of the node of this name, in the zone of this name ("" for none)."""
        return cls(name_id(node), name_id(zone))


class _Choice(NamedTuple):
    """The choices of one family for all ports: packed results with the bounds (in octets) of each port in them.

    `usable[i]`: port i has a usable endpoint somewhere. Bounds have one entry more than there are ports; a pool of port
    i is `pool[bounds[i]:bounds[i + 1]]`.
    """

    usable: list[bool]
    cluster: bytes
    cluster_at: list[int]
    local: bytes
    local_at: list[int]
    own: bytes
    own_at: list[int]
    serving: bytes
    serving_at: list[int]


def resolve(ports: Sequence[ServicePort], node: NodeView) -> list[ForwardedPort]:
    """What this node does for each port, in the order given. Ports are independent: resolving one alone is the same.

    Costs one pass over all endpoints of all ports (at most some 10 us a port of ten endpoints; below 100 us for one
    port alone). Never raises for canonical ports; a hint index outside of `hint_sets` counts as no hint.
    """
    uses4, uses6 = [], []
    for port in ports:
        internal = _USES_LOCAL if port.internal_local else _USES_CLUSTER
        public = _USES_LOCAL | _USES_CLUSTER if port.external_local else _USES_CLUSTER
        four = six = 0
        for frontend in port.frontends:
            use = internal if frontend.kind is _CLUSTER_IP else public
            if len(frontend.address) == 4:
                four |= use
            else:
                six |= use
        uses4.append(four)
        uses6.append(six)
    choice4 = _choose(ports, [port.endpoints4 for port in ports], uses4, node, 4)
    choice6 = _choose(ports, [port.endpoints6 for port in ports], uses6, node, 6)
    return [_forwarded(port, at, choice4, uses4[at], choice6, uses6[at]) for at, port in enumerate(ports)]


def _choose(
    ports: Sequence[ServicePort], packed: list[bytes], uses: list[int], node: NodeView, family: int
) -> _Choice | None:
    """The choices of one family; None if no port has an endpoint of it."""
    joined = b"".join(packed)
    if not joined:
        return None
    size, key = endpoint_dtype(family).itemsize, target_dtype(family).itemsize
    records = np.frombuffer(joined, endpoint_dtype(family))
    octets = np.frombuffer(joined, np.uint8).reshape(-1, size)
    lengths = np.fromiter(map(len, packed), np.int64, len(packed)) // size
    bounds = np.zeros(len(packed) + 1, np.int64)
    np.cumsum(lengths, out=bounds[1:])
    owner = np.repeat(np.arange(len(packed)), lengths)  # the port of each record

    def counts(column: _Bools) -> _Counts:
        """How many records of each port have it."""
        at = column.nonzero()[0].searchsorted(bounds)
        return at[1:] - at[:-1]

    def picked(column: _Bools, width: int) -> tuple[bytes, list[int]]:
        """The first `width` octets of the records that have it, and each port's bounds in them."""
        rows = column.nonzero()[0]
        return octets[rows, :width].tobytes(), (rows.searchsorted(bounds) * width).tolist()

    flags = records["flags"]
    ready = (flags & READY) != 0
    leaving = (flags & (SERVING | TERMINATING)) == (SERVING | TERMINATING)
    some_leaving = bool(leaving.any())

    cluster = ready
    if any(port.hint_sets for port in ports):
        cluster = ready & _near(ports, records["hints"], owner, ready, counts, node)
    if some_leaving:
        cluster = cluster | (leaving & ~(counts(ready) > 0)[owner])
    cluster_pool, cluster_at = picked(cluster, key)

    local_pool, local_at, own, own_at = b"", cluster_at, b"", cluster_at
    here = records["node"] == node.node_id
    if node.node_id != NO_NODE and here.any():
        local = here & ready
        if some_leaving:
            local |= here & leaving & ~(counts(local) > 0)[owner]
        local_pool, local_at = picked(local, key)
        used = np.array(uses, np.uint8)[owner]
        mine = here & (((used & _USES_CLUSTER) != 0) & cluster | ((used & _USES_LOCAL) != 0) & local)
        own, own_at = picked(_first_of_address(octets[:, : key - 2], mine, owner), key - 2)

    serving, serving_at = b"", cluster_at
    udp = [port.key.protocol == Protocol.UDP for port in ports]
    if any(udp):
        serving, serving_at = picked(((flags & (READY | SERVING)) != 0) & np.array(udp)[owner], key)

    usable = [start != end for start, end in itertools.pairwise(cluster_at)]
    return _Choice(usable, cluster_pool, cluster_at, local_pool, local_at, own, own_at, serving, serving_at)


def _near(
    ports: Sequence[ServicePort],
    hints: npt.NDArray[np.uint16],
    owner: _Counts,
    ready: _Bools,
    counts: Callable[[_Bools], _Counts],
    node: NodeView,
) -> _Bools:
    """Which records the topology hints leave (kube-proxy's topologyModeFromHints and availableForTopology)."""
    meanings: dict[tuple[HintSet, ...], bytes] = {}
    tables = []
    for port in ports:
        table = meanings.get(port.hint_sets)
        if table is None:
            table = meanings[port.hint_sets] = bytes((0, *(_meaning(hint_set, node) for hint_set in port.hint_sets)))
        tables.append(table)
    sizes = np.array([len(table) for table in tables])
    index = np.where(hints < sizes[owner], hints, 0) + (sizes.cumsum() - sizes)[owner]
    meaning = np.frombuffer(b"".join(tables), np.uint8)[index]

    in_force = []
    all_ready = counts(ready)
    for has, names in ((_HAS_NODES, _NAMES_NODE), (_HAS_ZONES, _NAMES_ZONE)):
        names_us = (meaning & names) != 0
        hinted = counts(ready & ((meaning & has) != 0))
        in_force.append((((hinted == all_ready) & (counts(ready & names_us) > 0))[owner], names_us))
    (by_node, names_node), (by_zone, names_zone) = in_force
    near: _Bools = (by_node & names_node) | (~by_node & (~by_zone | names_zone))
    return near


def _meaning(hint_set: HintSet, node: NodeView) -> int:
    meaning = 0
    if hint_set.nodes:
        meaning |= _HAS_NODES | (_NAMES_NODE if node.node_id != NO_NODE and node.node_id in hint_set.nodes else 0)
    if hint_set.zones:
        meaning |= _HAS_ZONES | (_NAMES_ZONE if node.zone_id != NO_NODE and node.zone_id in hint_set.zones else 0)
    return meaning


def _first_of_address(addresses: npt.NDArray[np.uint8], column: _Bools, owner: _Counts) -> _Bools:
    """`column` with only the first of each port's records of one address (several ports on it are neighbours)."""
    rows = column.nonzero()[0]
    if len(rows) < 2:
        return column
    chosen = addresses[rows]
    again = (chosen[1:] == chosen[:-1]).all(axis=1)
    if not again.any():
        return column
    port = owner[rows]
    again &= port[1:] == port[:-1]
    first = column.copy()
    first[rows[1:][again]] = False
    return first


def _forwarded(
    port: ServicePort, at: int, choice4: _Choice | None, uses4: int, choice6: _Choice | None, uses6: int
) -> ForwardedPort:
    cluster4, local4, own4, serving4, usable4 = _slices(choice4, at, uses4)
    cluster6, local6, own6, serving6, usable6 = _slices(choice6, at, uses6)
    frontends = []
    for frontend in port.frontends:
        kind, address = frontend.kind, frontend.address
        usable, local = (usable4, local4) if len(address) == 4 else (usable6, local6)
        near = _LOCAL if local else _DROP if usable else _REJECT
        far = _CLUSTER if usable else _REJECT
        if kind is _CLUSTER_IP:
            inside = outside = near if port.internal_local else far
            masquerade = _NONLOCAL
        elif port.external_local:
            inside, outside, masquerade = far, near, _HOST
        else:
            inside = outside = far
            masquerade = _ALWAYS
        frontends.append(ForwardedFrontend(kind, address, frontend.port, inside, outside, masquerade))
    return ForwardedPort(
        port.key,
        tuple(frontends),
        cluster4,
        cluster6,
        local4,
        local6,
        port.affinity_seconds,
        port.source_ranges,
        own4,
        own6,
        serving4,
        serving6,
    )


def _slices(choice: _Choice | None, at: int, uses: int) -> tuple[bytes, bytes, bytes, bytes, bool]:
    """Port `at`'s (cluster pool, local pool, own addresses, serving targets, usable); a pool it does not use is empty.

    An empty column has bounds of another one: slicing nothing gives nothing.
    """
    if choice is None:
        return b"", b"", b"", b"", False
    usable, cluster, cluster_at, local, local_at, own, own_at, serving, serving_at = choice
    after = at + 1
    return (
        cluster[cluster_at[at] : cluster_at[after]] if uses & _USES_CLUSTER else b"",
        local[local_at[at] : local_at[after]] if uses & _USES_LOCAL else b"",
        own[own_at[at] : own_at[after]],
        serving[serving_at[at] : serving_at[after]],
        usable[at],
    )
