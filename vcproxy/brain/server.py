"""The gRPC server that nodes connect to: vcproxy.v1.Distribution/Watch over mutual TLS.

grpc.aio facts that shape it: a handler without (de)serializers passes bytes through, so encoded messages are shared;
`write` returns when flow control allows, which is the back-pressure; a lost peer ends the request iterator as if it had
finished; a dead one is noticed only if `grpc.http2.ping_timeout_ms` is set besides the keepalive options.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from vcproxy.brain import completions
from vcproxy.brain.certificates import ServerCertificates
from vcproxy.brain.config import Listen
from vcproxy.brain.distribution import Distributor, Limits, Refused
from vcproxy.brain.identity import NotANode, node_of_peer
from vcproxy.ops import logs

SERVICE = "vcproxy.v1.Distribution"

_log = logs.get("distribution")

Context = grpc.aio.ServicerContext[bytes, bytes]


class ServeError(Exception):
    """The server cannot listen; the text names the address."""


async def serve(distributor: Distributor, listen: Listen, *, bound: Callable[[int], None] | None = None) -> None:
    """Serve until cancelled. `bound` gets the port, of use where the address says port 0.

    Raises CertificateError and ServeError.
    """
    certificates = ServerCertificates(
        certificate=Path(listen.cert_file), key=Path(listen.key_file), client_ca=Path(listen.client_ca_file)
    )

    async def watch(requests: AsyncIterator[bytes], context: Context) -> None:
        try:
            node = node_of_peer(context.auth_context())
            await distributor.attend(node, context.peer(), requests, context.write)
        except NotANode as error:
            await _refuse(context, "UNAUTHENTICATED", str(error))
        except Refused as refused:
            await _refuse(context, refused.code, refused.problem)

    completions.relieve(asyncio.get_running_loop())
    server = grpc.aio.server(options=_options(distributor.limits))
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"Watch": grpc.stream_stream_rpc_method_handler(watch)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    try:
        port = server.add_secure_port(listen.address, certificates.credentials())
    except RuntimeError as error:
        raise ServeError(f"cannot listen on {listen.address}: {error}") from None
    try:
        await server.start()
        _log.info("serving nodes", address=listen.address, port=port)
        if bound is not None:
            bound(port)
        await server.wait_for_termination()
    finally:
        await server.stop(grace=None)


async def _refuse(context: Context, code: str, problem: str) -> None:
    _log.warning("stream refused", peer=context.peer(), code=code, reason=problem)
    await context.abort(grpc.StatusCode[code], problem)


def _options(limits: Limits) -> Sequence[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", limits.message_octets),
        ("grpc.max_concurrent_streams", limits.streams_per_node),
        ("grpc.keepalive_time_ms", int(limits.keepalive * 1000)),
        ("grpc.keepalive_timeout_ms", int(limits.keepalive_timeout * 1000)),
        ("grpc.http2.ping_timeout_ms", int(limits.keepalive_timeout * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        # Nodes ping a silent stream too: do not take that for abuse.
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        ("grpc.so_reuseport", 0),
    ]
