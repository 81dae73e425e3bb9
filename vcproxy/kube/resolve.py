"""Host names of API servers, looked up so that one tenant's DNS never delays another's.

The event loop's own getaddrinfo runs in a pool of a few threads (four in libuv), shared by everybody: a handful of
kubeconfigs that name hosts whose DNS servers never answer would occupy it for good. Here every client has at most one
lookup going on, in a thread of its own; who asks meanwhile waits for that one. Connections are rare (watches last for
minutes), so are threads.

`look_up` is asked before DNS: some names mean something only where they were given.

`permit` is asked about every address right before it is connected to, be it from DNS or written in the URL: an
allowlist that only looked at names could be led anywhere by whoever runs their DNS.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future

from aiohttp.abc import AbstractResolver, ResolveResult

Permit = Callable[[ipaddress.IPv4Address | ipaddress.IPv6Address], bool]
"""Says whether an API server may be at this address."""

Address = tuple[str, int]
"""An IP address as text, and a port."""
LookUp = Callable[[str, int], Awaitable[Sequence[Address] | None]]
"""What to dial for a host and port; None: DNS knows. Raises OSError."""

RECEIVE_OCTETS = 32 << 10
"""What the kernel is asked to hold of a connection that is not read; it takes twice that, its own overhead included.

Left alone it is up to 6 MiB for each of some thousand watches (tcp_rmem), and whatever one read brings stays touched in
the buffers of TLS for as long as the connection lives: a third of the brain's memory. The price is 32 KiB for each
round trip, 3 MiB/s at 10 ms."""

_Infos = Sequence[tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[object, ...]]]


class Resolver(AbstractResolver):
    """Looks up the host of one client: in a thread of its own, one lookup at a time."""

    def __init__(self, look_up: LookUp | None = None) -> None:
        self._look_up = look_up
        self._running: Future[_Infos] | None = None

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """All addresses of the host. Raises OSError."""
        if self._look_up is not None and (found := await self._look_up(host, port)) is not None:
            return [_numeric(host, address, number) for address, number in found]
        if self._running is None or self._running.done():
            self._running = Future()
            arguments = (host, port, family, self._running)
            threading.Thread(target=_look_up, args=arguments, name="vcproxy-dns", daemon=True).start()
        # Shielded: who gives up waiting must not cancel what others may be waiting for.
        infos = await asyncio.shield(asyncio.wrap_future(self._running))
        return [
            ResolveResult(
                hostname=host, host=str(address[0]), port=port, family=family, proto=proto, flags=socket.AI_NUMERICHOST
            )
            for family, _, proto, _, address in infos
        ]

    async def close(self) -> None:
        """Nothing to close: a lookup under way ends by itself, unheard."""


def _numeric(host: str, address: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return ResolveResult(
        hostname=host, host=address, port=port, family=family, proto=socket.IPPROTO_TCP, flags=socket.AI_NUMERICHOST
    )


def _look_up(host: str, port: int, family: socket.AddressFamily, future: Future[_Infos]) -> None:
    try:
        future.set_result(socket.getaddrinfo(host, port, family, socket.SOCK_STREAM))
    except BaseException as error:
        future.set_exception(error)


def permitted_socket(permit: Permit | None) -> Callable[[tuple[object, ...]], socket.socket]:
    """A socket factory for aiohttp's connector that asks `permit` first. The factory raises PermissionError.

    The sockets hold little (RECEIVE_OCTETS).
    """

    def factory(info: tuple[object, ...]) -> socket.socket:
        family, kind, proto, _, address = info
        assert isinstance(address, tuple)
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
        plain = getattr(ip, "ipv4_mapped", None) or ip
        if permit is not None and not permit(plain):
            raise PermissionError(errno.EACCES, f"the operator's policy does not allow an API server at {plain}")
        made = socket.socket(family, kind, proto)  # type: ignore[arg-type]
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_OCTETS)  # before connect: it limits the window
        return made

    return factory
