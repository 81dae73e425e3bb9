"""Where tenants' API servers may be, and how their names are looked up.

A kubeconfig makes the brain open connections, from inside the operator's network and past its firewalls. For tenants
that a folder of the operator names, that is his choice. Elsewhere the kubeconfig was written by a controller that
tenants can steer, so it may not lead to this machine, to link-local addresses (metadata services), to nodes (kubelets,
etcd) or to the super cluster's own API server, whatever its host is called and whatever DNS says at that moment: each
address is judged right before it is connected to. `tenants.policy.apiServers` narrows further, for all sources: what it
lists is allowed, also of the above, and nothing else is.

Control planes that run in the super cluster are named as Services there (`apiserver-svc.ROOT`), names that mean nothing
to the DNS of a brain on the host's network. And a ClusterIP works where this product works, on which its brain must not
depend. So such a name is looked up in the super cluster itself, and its endpoints are dialled directly; the certificate
is asked for the name. What was found stays good while the super cluster does not answer.
"""

import asyncio
import errno
import fnmatch
import ipaddress
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from yarl import URL

from vcproxy.brain.placement import Placement
from vcproxy.brain.superaccess import SuperAccess
from vcproxy.kube import shapes
from vcproxy.kube.client import Client
from vcproxy.kube.errors import ApiError, NotFound
from vcproxy.kube.kubeconfig import Credentials
from vcproxy.kube.resolve import Address, Permit
from vcproxy.model.addresses import AddressError, Prefix, covered, is_address, never_allowed, parse_prefix

PATIENCE_SECONDS = 2.0
"""How long the super cluster is waited for where the last answer is known: less than a connection's own deadline."""
REMEMBERED = 10_000
"""Names of which the last answer is kept."""


class Names(Protocol):
    """Looks up host names in another place than DNS."""

    async def look_up(self, host: str, port: int) -> Sequence[Address] | None:
        """Addresses and ports to dial, in this order; None: not a name of that place. Raises OSError."""


class ApiServers:
    """The rules, for one brain. `allowed`: host names (with `*`) and CIDRs, as in `tenants.policy.apiServers`.

    `access` None: no super cluster, and so nothing of it to keep tenants from. `known` says whether nodes have been
    read: before that nobody who is restricted is connected to.
    """

    def __init__(
        self,
        allowed: Sequence[str] = (),
        *,
        access: SuperAccess | None = None,
        placement: Placement | None = None,
        known: Callable[[], bool] = lambda: True,
    ) -> None:
        self._ranges, self._hosts = _sorted_out(allowed)
        self._access = access
        self._placement = placement
        self._known = known
        self.names: Names | None = SuperServices(access) if access is not None else None

    def connect(self, credentials: Credentials, *, restricted: bool, **more: Any) -> Client:
        """A client for a tenant's API server that keeps to the rules. Raises KubeconfigError."""
        permit = self.permit(credentials.server, restricted=restricted)
        look_up = self.names.look_up if self.names is not None and restricted else None
        return Client(credentials, permit=permit, look_up=look_up, **more)

    def permit(self, server: str, *, restricted: bool) -> Permit | None:
        """Judges the addresses of one kubeconfig's `server`; None: any is good."""
        listed = bool(self._ranges or self._hosts)
        if not (restricted or listed):
            return None
        host = URL(server).host or ""
        named = any(fnmatch.fnmatchcase(host, pattern) for pattern in self._hosts)

        def judge(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
            address = ip.packed
            if covered(address, self._ranges):
                return True
            if restricted and not self._known():
                raise PermissionError(errno.EACCES, "Nodes have not been read yet, and API servers must not be at one")
            if never_allowed(address) or (restricted and self._is_ours(address)):
                return False
            return named or not listed

        return judge

    def _is_ours(self, address: bytes) -> bool:
        """The super cluster's API server, or a node."""
        if self._access is not None and address in self._access.addresses:
            return True
        return self._placement is not None and self._placement.is_node(address)


def _sorted_out(allowed: Sequence[str]) -> tuple[tuple[Prefix, ...], tuple[str, ...]]:
    ranges: list[Prefix] = []
    hosts: list[str] = []
    for text in allowed:
        try:
            ranges.append(parse_prefix(text))
        except AddressError:
            if "/" in text or not text:
                raise
            hosts.append(text.lower())
    return tuple(ranges), tuple(hosts)


class SuperServices:
    """Services of the super cluster by name: NAME.NAMESPACE, NAME.NAMESPACE.svc and NAME.NAMESPACE.svc.DOMAIN."""

    def __init__(self, access: SuperAccess, *, patience: float = PATIENCE_SECONDS) -> None:
        self._access = access
        self._patience = patience
        self._found: dict[tuple[str, int], Sequence[Address] | None] = {}

    async def look_up(self, host: str, port: int) -> Sequence[Address] | None:
        """Endpoints that are ready, or without any, the ClusterIP. Raises OSError when nobody knows."""
        labels = host.lower().removesuffix(".").split(".")
        if len(labels) < 2 or (len(labels) > 2 and labels[2] != "svc"):
            return None
        name, namespace = labels[:2]
        found: Sequence[Address] | None = None
        known = (host, port) in self._found
        try:
            async with asyncio.timeout(self._patience if known else None):
                found = await self._ask(namespace, name, port)
        except NotFound:
            pass  # DNS may know it, now and while nobody answers
        except (ApiError, TimeoutError) as error:
            if known:
                return self._found[host, port]
            raise OSError(f"{host} cannot be looked up in the super cluster: {error}") from error
        if known or len(self._found) < REMEMBERED:
            self._found[host, port] = found
        return found

    async def _ask(self, namespace: str, name: str, port: int) -> Sequence[Address]:
        service = await self._access.client.get_json(f"/api/v1/namespaces/{namespace}/services/{name}", shapes.Service)
        wanted = {said.name for said in service.spec.ports if said.port == port}
        targets = [
            (endpoint.addresses[0], said.port)
            for held in await self._access.endpoint_slices(namespace, name)
            for said in held.ports or ()
            for endpoint in held.endpoints or ()
            if (said.name or "") in wanted
            and said.port
            and endpoint.addresses
            and endpoint.conditions.ready is not False
        ]
        virtual = [(text, port) for text in service.spec.cluster_ips or (service.spec.cluster_ip,)]
        return [address for address in sorted(set(targets)) or virtual if is_address(address[0])]
