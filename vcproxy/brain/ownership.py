"""Whose an endpoint's address is: what the super cluster says of it, never what the tenant says.

A tenant writes its EndpointSlices itself, so with nothing but those it could make a Service of its own that leads to a
node's kubelet, a cloud's database or another tenant's pod, from addresses that are trusted there (CVE-2021-25740, the
confused deputy). What a tenant cannot write are the super cluster's Pods and Nodes. They are indexed here by address,
so that one endpoint is judged by two or three look-ups, and one Pod's change asks again about that Pod's addresses
only: whoever leads to one of them is told at once, in the call in which the Pod changes.

- An address is a tenant's from the moment that a Pod of its is seen to have it until that Pod has ended or is gone.
  Before, an endpoint *waits*: it is refused, and admitted without anybody writing anything again.
- Where addresses are unique over all tenants, one that is taken over is nobody's until its former owner is gone: two
  pods that both seem to have it are one that has and one that had. In networks of the tenants' own both are right, and
  so they are unless the operator says which it is.
- A tenant's own API server is an endpoint of its `default/kubernetes`, and no pod of the tenant.

Until everything has been read once (`known`) nothing is judged at all: a tenant whose pods are not known yet would seem
to have none.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import cast

from vcproxy.brain.guard import Policy, Reason
from vcproxy.brain.placement import Claim, Placement
from vcproxy.model.addresses import covered
from vcproxy.model.node import NodeFacts

Key = tuple[str, str]
Owners = str | tuple[str, ...]
"""The uid whose pod has an address; of several pods with one address, all their uids."""

API_SERVICE: Key = ("default", "kubernetes")


class Ownership:
    """Addresses of pods, nodes and API servers. Not thread-safe; listeners are called from within the changing call."""

    def __init__(self) -> None:
        self.known = False
        self._owners: dict[bytes, Owners] = {}
        self._facts: dict[str, frozenset[bytes]] = {}
        self._nodes: dict[bytes, int] = {}  # how many Node objects have the address
        self._api_servers: dict[str, frozenset[bytes]] = {}
        self._rights: dict[str, Rights] = {}
        self._curious: set[str] = set()  # tenants to whom others' pods matter

    # --- what tenants are judged by -----------------------------------------------------------------------------------

    def rights(self, uid: str, policy: Policy) -> "Rights":
        """The tenant's, by this policy, in place of those given out before."""
        self._rights[uid] = found = Rights(self, uid, policy)
        self._curious.discard(uid)
        if not policy.own_pods_only:
            self._curious.add(uid)
        return found

    def forget(self, uid: str) -> None:
        """The tenant is gone. Its pods are the business of whoever told of them."""
        self._rights.pop(uid, None)
        self._curious.discard(uid)
        self._api_servers.pop(uid, None)

    def judge(self, address: bytes, uid: str, policy: Policy, *, api_server: bool) -> Reason | None:
        """Why this tenant may not have an endpoint there; None: it may. `api_server`: for `default/kubernetes`."""
        if policy.deny_nodes and address in self._nodes:
            return Reason.NODE_ADDRESS
        owners = self._owners.get(address)
        if owners == uid or (type(owners) is tuple and _owned(owners, uid, alone=policy.unique_addresses)):
            return None
        if api_server and address in self._api_servers.get(uid, ()):
            return None
        if policy.denied_ranges and covered(address, policy.denied_ranges):
            return Reason.DENIED_RANGE
        if owners is not None and policy.denies_other_pods:
            return Reason.OTHER_TENANTS_POD
        if not policy.own_pods_only or covered(address, policy.egress):
            return None
        return Reason.NOT_OWN_POD

    def refused(self, addresses: Collection[bytes], uid: str, policy: Policy, service: Key) -> dict[bytes, Reason]:
        """Those of the addresses where this tenant's `service` may not have an endpoint, and why.

        Nearly always they are pods of the tenant, all of them, or where that is enough, nobody's: that is told for all
        at once, without a loop of ours.
        """
        owners = self._owners.get
        whose = set(map(owners, addresses))
        harmless = {uid} if policy.own_pods_only or policy.denied_ranges else {uid, None}
        if whose <= harmless and not (policy.deny_nodes and not self._nodes.keys().isdisjoint(addresses)):
            return {}
        api_server = service == API_SERVICE
        judged = ((address, self.judge(address, uid, policy, api_server=api_server)) for address in addresses)
        return {address: reason for address, reason in judged if reason is not None}

    # --- what the super cluster says ----------------------------------------------------------------------------------

    def set_known(self) -> None:
        """All Pods and Nodes have been read once. Never unset: later failures leave what is known as it is."""
        if not self.known:
            self.known = True
            for rights in list(self._rights.values()):
                rights.wake()

    def move(self, old: Iterable[Claim], new: Iterable[Claim]) -> None:
        """A Pod that stood for the claims `old` stands for `new` from now on."""
        before = {(claim.address, claim.tenant) for claim in old if claim.address}
        after = {(claim.address, claim.tenant) for claim in new if claim.address}
        touched: dict[bytes, set[str]] = {}
        for address, uid in after ^ before:
            tenants = touched.setdefault(address, set())
            tenants.update(_each(self._owners.get(address)), (uid,))
        for address, uid in after - before:
            self._own(address, uid)
        for address, uid in before - after:
            self._disown(address, uid)
        for address, uids in touched.items():
            self._reconsider(address, uids)

    def put_node(self, node: str, facts: NodeFacts | None) -> None:
        """The Node has these facts now; None: it is gone."""
        old = self._facts.pop(node, frozenset())
        new = frozenset(facts.addresses) if facts is not None else frozenset()
        if new:
            self._facts[node] = new
        for address in new - old:
            self._nodes[address] = self._nodes.get(address, 0) + 1
        for address in old - new:
            self._nodes[address] -= 1
            if not self._nodes[address]:
                del self._nodes[address]
        for address in new ^ old:
            self._reconsider(address, self._rights)

    def put_api_servers(self, uid: str, addresses: frozenset[bytes]) -> None:
        """The tenant's control plane has its API servers at these addresses now."""
        old = self._api_servers.pop(uid, frozenset())
        if addresses:
            self._api_servers[uid] = addresses
        for address in addresses ^ old:
            self._reconsider(address, (uid,))

    def reading(self, placement: Placement) -> Placement:
        """The placement, as whoever follows the super cluster's Pods and Nodes is to write it: this reads along."""
        return cast("Placement", _ReadAlong(self, placement))

    # --- details ------------------------------------------------------------------------------------------------------

    def _own(self, address: bytes, uid: str) -> None:
        held = self._owners.get(address)
        self._owners[address] = uid if held is None else (*_each(held), uid)

    def _disown(self, address: bytes, uid: str) -> None:
        rest = list(_each(self._owners[address]))
        rest.remove(uid)
        if rest:
            self._owners[address] = rest[0] if len(rest) == 1 else tuple(rest)
        else:
            del self._owners[address]

    def _reconsider(self, address: bytes, uids: Iterable[str]) -> None:
        """Tell whom it concerns: those tenants, and all to whom others' pods matter."""
        for uid in self._curious.union(uids):
            if (rights := self._rights.get(uid)) is not None:
                rights.reconsider(address)


class Rights:
    """One tenant's right to endpoint addresses. `reconsider` gets addresses about which the answer may have changed,
    `wake` is called when `known` turns true; whoever compiles sets both.
    """

    def __init__(self, ownership: Ownership, uid: str, policy: Policy) -> None:
        self.policy = policy
        self.reconsider: Callable[[bytes], None] = lambda address: None
        self.wake: Callable[[], None] = lambda: None
        self._ownership = ownership
        self._uid = uid

    @property
    def known(self) -> bool:
        """Whether answers can be given."""
        return self._ownership.known

    def refused(self, addresses: Collection[bytes], service: Key) -> dict[bytes, Reason]:
        """Those of the addresses where `service` may not have an endpoint, and why."""
        return self._ownership.refused(addresses, self._uid, self.policy, service)


class _ReadAlong:
    """The methods of a Placement by which Pods and Nodes are told, for two listeners."""

    def __init__(self, ownership: Ownership, placement: Placement) -> None:
        self._ownership = ownership
        self._placement = placement

    def move(self, old: Sequence[Claim], new: Sequence[Claim]) -> None:
        """See Placement."""
        self._ownership.move(old, new)
        self._placement.move(old, new)

    def put_facts(self, node: str, facts: NodeFacts | None) -> None:
        """See Placement."""
        self._ownership.put_node(node, facts)
        self._placement.put_facts(node, facts)


def _each(owners: Owners | None) -> tuple[str, ...]:
    return owners if isinstance(owners, tuple) else () if owners is None else (owners,)


def _owned(owners: tuple[str, ...], uid: str, *, alone: bool) -> bool:
    return all(owner == uid for owner in owners) if alone else uid in owners
