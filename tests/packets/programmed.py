"""The nftables backend on a node of the lab, and forwarding tables written the short way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from vcproxy.backend.protocol import Applied, Attachments, Drift, NodeState, TenantUpdate
from vcproxy.lab import Node, Outcome, Pod, Reply, netns
from vcproxy.model.addresses import Prefix, parse_address, parse_prefix
from vcproxy.model.forwarding import Action, ForwardedFrontend, ForwardedPort, Masquerade
from vcproxy.model.services import FrontendKind, PortKey, Protocol
from vcproxy_nftables import NftablesBackend

FAMILIES = (4, 6)
ALL = {4: bytes(4), 6: bytes(16)}


class Programmed:
    """A backend inside a node's namespace: every call enters it, as the agent lives in it."""

    def __init__(self, node: Node, options: dict[str, Any] | None = None) -> None:
        self.node = node
        self.backend = NftablesBackend(options or {})
        self._do(self.backend.open)

    def _do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with netns.entered(self.node.ns):
            return function(*arguments)

    def set_node(self, **facts: Any) -> None:
        self._do(self.backend.set_node, NodeState(**facts))

    def attach(self, *, interfaces: dict[str, str] | None = None, addresses: dict[bytes, str] | None = None) -> None:
        self._do(self.backend.attach, Attachments(interfaces=interfaces or {}, addresses=addresses or {}))

    def put(self, uid: str, *ports: ForwardedPort, ranges: tuple[Prefix, ...] = (), complete: bool = False) -> Applied:
        applied: Applied = self._do(
            self.backend.apply, TenantUpdate(uid, put=ports, complete=complete, virtual_ranges=ranges)
        )
        return applied

    def remove(self, uid: str, *keys: PortKey) -> Applied:
        applied: Applied = self._do(self.backend.apply, TenantUpdate(uid, removed=keys))
        return applied

    def remove_tenant(self, uid: str) -> None:
        self._do(self.backend.remove_tenant, uid)

    def repair(self) -> Drift:
        drift: Drift = self._do(self.backend.repair)
        return drift

    def dump(self, uid: str | None = None) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._do(self.backend.dump, uid)
        return rows

    def cleanup(self) -> None:
        self._do(self.backend.cleanup)

    def reopened(self) -> Programmed:
        """The next run of the agent: this backend is closed, another opened."""
        self.backend.close()
        return Programmed(self.node)


@contextmanager
def programmed(*nodes: Node) -> Iterator[list[Programmed]]:
    """Backends on nodes, gone with all they did at the end."""
    backends: list[Programmed] = []
    try:
        for node in nodes:
            backends.append(Programmed(node))
            prefixes = tuple(parse_prefix(cidr) for each in nodes for cidr in (each.pod_cidr4, each.pod_cidr6))
            addresses = (parse_address(node.ip4), parse_address(node.ip6))
            backends[-1].set_node(node_addresses=addresses, local_sources=prefixes)
        yield backends
    finally:
        for backend in backends:
            backend.cleanup()


def key(name: str = "web", protocol: Protocol = Protocol.TCP) -> PortKey:
    return PortKey("default", name, "", protocol)


def packed(pods: Iterable[Pod], family: int, port: int) -> bytes:
    addresses = sorted(parse_address(pod.ip4 if family == 4 else pod.ip6) for pod in pods)
    return b"".join(address + port.to_bytes(2, "big") for address in addresses)


def frontend(
    kind: FrontendKind,
    address: str | int,
    port: int,
    *,
    inside: Action = Action.CLUSTER,
    outside: Action | None = None,
    masquerade: Masquerade | None = None,
) -> ForwardedFrontend:
    """`address`: a family for a node port."""
    default = Masquerade.NONLOCAL if kind is FrontendKind.CLUSTER_IP else Masquerade.ALWAYS
    return ForwardedFrontend(
        kind,
        ALL[address] if isinstance(address, int) else parse_address(address),
        port,
        inside,
        inside if outside is None else outside,
        default if masquerade is None else masquerade,
    )


def cluster_ip(*addresses: str, port: int = 80, inside: Action = Action.CLUSTER) -> tuple[ForwardedFrontend, ...]:
    return tuple(frontend(FrontendKind.CLUSTER_IP, address, port, inside=inside) for address in addresses)


def service(
    frontends: Iterable[ForwardedFrontend],
    pods: Iterable[Pod] = (),
    *,
    name: str = "web",
    protocol: Protocol = Protocol.TCP,
    port: int = 80,
    local: Iterable[Pod] = (),
    own: Iterable[Pod] = (),
    serving: Iterable[Pod] | None = None,
    **more: Any,
) -> ForwardedPort:
    """A service port of both families. `own`: pods on the node that this is for."""
    held, here, served = list(pods), list(local), list(pods if serving is None else serving)
    udp = protocol is Protocol.UDP
    return ForwardedPort(
        key(name, protocol),
        tuple(frontends),
        cluster4=packed(held, 4, port),
        cluster6=packed(held, 6, port),
        local4=packed(here, 4, port),
        local6=packed(here, 6, port),
        own4=b"".join(sorted(parse_address(pod.ip4) for pod in own)),
        own6=b"".join(sorted(parse_address(pod.ip6) for pod in own)),
        serving4=packed(served, 4, port) if udp else b"",
        serving6=packed(served, 6, port) if udp else b"",
        **more,
    )


def answered_by(request: Callable[[], Outcome], times: int = 12) -> set[str]:
    """Who answers a request, asked often enough that each of two or three will. Fails if nobody does."""
    names: set[str] = set()
    for _ in range(times):
        outcome = request()
        assert isinstance(outcome, Reply), outcome
        names.add(outcome.pod)
    return names


def flows(node: Node, zone: int) -> list[str]:
    """Connections in a zone: in both directions (overlays), or in the original one only (flat networks)."""
    ran = [node.run(["conntrack", "-L", "-f", family]) for family in ("ipv4", "ipv6")]
    wanted = {f"zone={zone}", f"zone-orig={zone}"}
    return [line for done in ran for line in done.stdout.splitlines() if wanted & set(line.split())]


def eventually(condition: Callable[[], bool], *, seconds: float = 5.0) -> None:
    """Wait until a condition holds; fails at the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(0.02)
