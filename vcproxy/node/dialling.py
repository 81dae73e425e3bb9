"""Streams to brains over gRPC with mutual TLS.

A name that stands for several replicas is dialled at a random one of its addresses, not at the first. Certificates are
read at each attempt: gRPC's client side cannot reload them, and a rotation does not end a stream that stands. A brain
that is dead but whose connection stands is noticed by pings, within `keepalive` plus its timeout
(`grpc.http2.ping_timeout_ms` is what counts; without it gRPC waits more than a minute whatever the keepalive options).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import grpc

from vcproxy.node.session import Link, StreamEnded

METHOD = "/vcproxy.v1.Distribution/Watch"

LARGEST_MESSAGE = 16 << 20
"""Octets. Parts of snapshots are cut at 256 KiB, but one service port is never divided."""

_ANY_ADDRESS = '{"loadBalancingConfig":[{"pick_first":{"shuffleAddressList":true}}]}'  # gRFC A62


class Tls(Protocol):
    """Paths of PEM files, as in the configuration's `brain`. `server_name`: "" for the host that is dialled."""

    @property
    def cert_file(self) -> str:
        """This node's certificate, with its chain."""

    @property
    def key_file(self) -> str:
        """Its key."""

    @property
    def ca_file(self) -> str:
        """The CA that signs the brain's certificate."""

    @property
    def server_name(self) -> str:
        """The name that must be in the brain's certificate."""


class Dialler:
    """Makes streams; a session.Connect. Times in seconds."""

    def __init__(self, tls: Tls, *, keepalive: float = 10.0, keepalive_timeout: float = 10.0) -> None:
        self._tls = tls
        self._keepalive = keepalive
        self._keepalive_timeout = keepalive_timeout

    @contextlib.asynccontextmanager
    async def __call__(self, address: str, host: str) -> AsyncIterator[Link]:
        """As session.Connect says."""
        async with self._channel(address, self._tls.server_name or host) as channel:
            call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(METHOD)()
            try:
                yield _Call(call)
            finally:
                call.cancel()

    def _channel(self, address: str, server_name: str) -> grpc.aio.Channel:
        try:
            certificate, key, ca = (
                Path(path).read_bytes() for path in (self._tls.cert_file, self._tls.key_file, self._tls.ca_file)
            )
        except OSError as error:
            raise StreamEnded(f"a certificate cannot be read: {error}") from None
        milliseconds = int(self._keepalive_timeout * 1000)
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", LARGEST_MESSAGE),
            ("grpc.keepalive_time_ms", int(self._keepalive * 1000)),
            ("grpc.keepalive_timeout_ms", milliseconds),
            ("grpc.http2.ping_timeout_ms", milliseconds),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.enable_retries", 0),
            # No proxy from the environment, and no connection (or its backoff) left over from an earlier attempt.
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.service_config", _ANY_ADDRESS),
        ]
        if server_name:
            options.append(("grpc.ssl_target_name_override", server_name))
        return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate), options)


class _Call:
    """The Link of a call."""

    def __init__(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        self._call = call

    async def read(self) -> bytes:
        try:
            raw = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise StreamEnded(f"{error.code().name}: {error.details()}") from None
        if not isinstance(raw, bytes):
            raise StreamEnded("the brain ended the stream")
        return raw

    async def write(self, data: bytes) -> None:
        # A stream that is over tells why when it is read, and a reader there always is.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._call.write(data)
