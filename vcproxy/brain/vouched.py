"""What the super cluster vouches for on a tenant's behalf: facts that the tenant's own API server has no say in.

VirtualCluster copies a tenant's Services into the super cluster, which gives each a ClusterIP of its own, and bakes
that *super* ClusterIP into the tenant's pods (their DNS server, the address of `kubernetes`). So such a Service must
answer there too: its *alias*. The address is taken from the super Service, never from what the tenant says of it, and
counts for the one tenant Service whose uid the super Service carries; a Service deleted and made again has another.

And the tenant's own API server is a legitimate endpoint (of `default/kubernetes`) though it is no pod of the tenant:
its addresses are those of its control-plane Pods in the super cluster.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

Key = tuple[str, str]
"""(namespace, name) of a Service in the tenant's API."""


class Alias(NamedTuple):
    """Further virtual addresses (4 or 16 octets) of the Service with this uid."""

    uid: str
    addresses: tuple[bytes, ...]


class Aliases:
    """The aliases of one tenant's Services. `changed` gets the keys of Services that are to be compiled again."""

    def __init__(self) -> None:
        self.changed: Callable[[Iterable[Key]], None] | None = None
        self._aliases: dict[Key, Alias] = {}
        self._claimants: dict[bytes, set[Key]] = {}

    @property
    def empty(self) -> bool:
        """No Service has any."""
        return not self._aliases

    def put(self, key: Key, alias: Alias | None) -> None:
        """The Service's alias is now this; None: it has none."""
        old = self._aliases.get(key)
        if alias == old:
            return
        touched = {key}
        for address in old.addresses if old else ():
            held = self._claimants[address]
            held.discard(key)
            touched |= held
            if not held:
                del self._claimants[address]
        if alias is None:
            del self._aliases[key]
        else:
            self._aliases[key] = alias
            for address in alias.addresses:
                held = self._claimants.setdefault(address, set())
                touched |= held
                held.add(key)
        if self.changed is not None:
            self.changed(touched)

    def addresses(self, key: Key, uid: str) -> tuple[bytes, ...]:
        """The aliases of the Service that has this uid. Where several claim an address, the first by name has it."""
        alias = self._aliases.get(key)
        if alias is None or alias.uid != uid:
            return ()
        return tuple(address for address in alias.addresses if min(self._claimants[address]) == key)

    def claimants(self, address: bytes) -> frozenset[Key]:
        """Services that have this address as an alias."""
        return frozenset(self._claimants.get(address, ()))


class Vouched:
    """All tenants', by uid."""

    def __init__(self) -> None:
        self._aliases: dict[str, Aliases] = {}
        self._servers: dict[str, dict[Hashable, tuple[bytes, ...]]] = {}
        self._subscribers: list[Callable[[str], None]] = []

    def aliases(self, uid: str) -> Aliases:
        """The tenant's, kept up to date."""
        return self._aliases.setdefault(uid, Aliases())

    def put_alias(self, uid: str, key: Key, alias: Alias | None) -> None:
        """The alias of one of the tenant's Services is now this; None: it has none."""
        held = self.aliases(uid)
        held.put(key, alias)
        self._tidy(uid, held)

    def api_servers(self, uid: str) -> frozenset[bytes]:
        """Where the tenant's API server runs, as far as the super cluster's Pods say."""
        held = self._servers.get(uid, {})
        return frozenset(address for addresses in held.values() for address in addresses)

    def put_api_server(self, uid: str, source: Hashable, addresses: tuple[bytes, ...]) -> None:
        """The Pod `source` of the tenant's control plane is at these addresses now; (): it is gone."""
        held = self._servers.setdefault(uid, {})
        before = held.get(source, ())
        if addresses:
            held[source] = addresses
        else:
            held.pop(source, None)
        if not held:
            del self._servers[uid]
        if before != addresses:
            for callback in self._subscribers:
                callback(uid)

    def subscribe(self, callback: Callable[[str], None]) -> None:
        """`callback` gets the uid of a tenant whose API server's addresses have changed."""
        self._subscribers.append(callback)

    def forget(self, uid: str) -> None:
        """The tenant is gone, and nobody listens for it any more."""
        held = self._aliases.get(uid)
        if held is not None:
            held.changed = None
            self._tidy(uid, held)

    def _tidy(self, uid: str, held: Aliases) -> None:
        if held.empty and held.changed is None:
            del self._aliases[uid]
