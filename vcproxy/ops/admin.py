"""The admin socket: JSON over HTTP on a unix socket, the data behind `status`, `get` and every other look inside.

A unix socket of mode 0600: who may read it is root's business, and there is no port to guard. Each route is a plain
function from query parameters to plain data, run on the event loop: providers answer from memory.
"""

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

Provider = Callable[[Mapping[str, str]], Any]


class AdminError(Exception):
    """The admin socket could not answer; the message says why and what to do."""


@contextlib.asynccontextmanager
async def serve(path: str, routes: Mapping[str, Provider]) -> AsyncIterator[None]:
    """Serve `routes` ("/status" -> provider) on the unix socket `path` while the context is open.

    A socket file left by a dead process is replaced; a live one is an error. A provider that raises KeyError answers
    404 with its message. Raises AdminError when the path cannot be bound.
    """
    listener = _bind(path)
    app = web.Application()
    for route, provider in routes.items():
        app.router.add_get(route, _handler(provider))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    try:
        yield
    finally:
        await runner.cleanup()
        Path(path).unlink(missing_ok=True)


def _bind(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        if Path(path).is_socket() and listener.connect_ex(path) == 0:
            raise AdminError(f"adminSocket {path}: another vcproxy answers there: stop it, or choose another path")
        listener.close()
        listener = socket.socket(socket.AF_UNIX)
        Path(path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        Path(path).unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
    except OSError as error:
        listener.close()
        raise AdminError(f"adminSocket {path}: {error.strerror or error}: choose a path this user can write") from error
    except AdminError:
        listener.close()
        raise
    return listener


def _handler(provider: Provider) -> Callable[[web.Request], Any]:
    async def answer(request: web.Request) -> web.Response:
        try:
            body, status = provider(request.query), 200
        except KeyError as error:
            body, status = {"error": str(error.args[0])}, 404
        encoded = msgspec.json.encode(body, enc_hook=_plain)
        return web.Response(body=encoded, status=status, content_type="application/json")

    return answer


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset | set):
        return sorted(value)
    return str(value)


async def fetch(path: str, route: str, parameters: Mapping[str, str] | None = None) -> Any:
    """One answer from an admin socket, as plain data. Raises AdminError."""
    connector = aiohttp.UnixConnector(path)
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session:
        try:
            async with session.get(f"http://vcproxy{route}", params=parameters) as response:
                if response.content_type != "application/json":
                    raise AdminError(f"{path} has no {route}: ask the other daemon's socket (--socket)")
                body = msgspec.json.decode(await response.read())
                if response.status != 200:
                    raise AdminError(body["error"])
                return body
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise AdminError(
                f"{path}: {error}: is vcproxy running, and are you root? (--socket names another)"
            ) from error
