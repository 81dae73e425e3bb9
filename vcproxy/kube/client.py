"""One tenant's API server over HTTP/1.1: bounded, never redirected, never proxied, never decompressed.

A small layer over aiohttp, where each choice answers something a hostile or ailing server can do:

- the TLS context, the connections and the DNS lookups are this tenant's own (identity.py, resolve.py);
- no answer is read beyond a budget in bytes, and none is compressed (`Accept-Encoding: identity`): nothing expands;
- redirects, cookies and proxies from the environment do not exist;
- every request has a deadline, and so has a list; of a watch only the beginning has one, its reader judges its silence;
- receive buffers stay small (256 KiB, twice that until the sender is paused): a thousand tenants share one process.

What comes out is bytes; what goes wrong is an `ApiError` (errors.py), never an exception of a library.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import msgspec
from yarl import URL

from vcproxy.kube.decode import UNDECODABLE, HasKey, Page, Resource, decode_list
from vcproxy.kube.errors import (
    ApiError,
    BadResponse,
    KubeconfigError,
    TooLarge,
    Unreachable,
    Unserved,
    error_of_status,
    printable,
)
from vcproxy.kube.identity import FileToken, tls_context
from vcproxy.kube.initial import ALL_FIRST, Initial
from vcproxy.kube.kubeconfig import Credentials
from vcproxy.kube.lines import Line, LineCutter
from vcproxy.kube.resolve import LookUp, Permit, Resolver, permitted_socket

T = TypeVar("T", bound=HasKey)
S = TypeVar("S")

USER_AGENT = "vcproxy"
MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
MAX_ERROR_BYTES = 1 << 14
MAX_RETRY_AFTER = 300.0
"""Longest wish of a server to be left alone that is followed, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one API server may make us hold and wait for. Sizes in bytes, times in seconds.

    object_bytes: one object's JSON; etcd holds 1.5 MiB. page_bytes: one answer, which is decoded in one go.
    list_bytes, list_objects, list_seconds: one list, in pages or a stream. stalled_seconds: between parts of a stream.
    connect_seconds: TCP and TLS. request_seconds: one request, and the beginning of a watch. connections: at once, all.
    """

    object_bytes: int = 2 << 20
    page_bytes: int = 16 << 20
    list_bytes: int = 256 << 20
    list_objects: int = 250_000
    list_seconds: float = 300.0
    stalled_seconds: float = 10.0
    connect_seconds: float = 10.0
    request_seconds: float = 30.0
    connections: int = 8


class Client:
    """Requests to one API server, in the name of one tenant; an async context manager that closes its connections.

    No connection is opened before the first request. `tenant` only names the tenant in errors. `permit`, `look_up`: see
    resolve.py. Works on asyncio's and uvloop's loops.
    Paths are those of the API, below the server's own; parts that a tenant chose must be percent-encoded.
    Raises KubeconfigError when certificate and key do not belong together.
    """

    def __init__(
        self,
        credentials: Credentials,
        *,
        tenant: str,
        limits: Limits | None = None,
        permit: Permit | None = None,
        look_up: LookUp | None = None,
    ) -> None:
        self.credentials = credentials
        self.tenant = tenant
        self.limits = limits or Limits()
        self._permit = permit
        self._look_up = look_up
        self._session: aiohttp.ClientSession | None = None
        self._token_file = FileToken(Path(credentials.token_file)) if credentials.token_file else None
        self._tls = tls_context(credentials)

    async def __aenter__(self) -> Self:
        """Nothing happens yet."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes all connections."""
        await self.close()

    async def close(self) -> None:
        """Closes all connections; requests under way fail as Unreachable."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    # --- requests

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: bytes | None = None,
        content_type: str = "application/json",
    ) -> bytes:
        """One request and its whole JSON answer, at most `limits.page_bytes` long. Raises ApiError."""
        headers = {"Content-Type": content_type} if body is not None else {}
        async with self._errors(path), asyncio.timeout(self.limits.request_seconds):
            response = await self._send(method, path, params=params, body=body, headers=headers)
            try:
                return await self._read(response, path)
            finally:
                response.release()

    async def get_json(self, path: str, shape: type[S], *, params: Mapping[str, str] | None = None) -> S:
        """One GET, decoded into `shape`. Raises ApiError; BadResponse where the answer does not have that shape."""
        body = await self.request("GET", path, params=params)
        try:
            return msgspec.json.decode(body, type=shape)
        except UNDECODABLE as error:
            raise BadResponse(tenant=self.tenant, path=path, message=str(error)) from None

    async def post(self, path: str, value: Any) -> bytes:
        """Creates an object in the collection `path`; returns it as the server has it. Raises ApiError, so Conflict."""
        return await self.request("POST", path, body=msgspec.json.encode(value))

    async def patch(
        self, path: str, value: Any, *, content_type: str = MERGE_PATCH, params: Mapping[str, str] | None = None
    ) -> bytes:
        """Patches the object at `path`; returns it as the server holds it. Raises ApiError."""
        encoded = msgspec.json.encode(value)
        return await self.request("PATCH", path, params=params, body=encoded, content_type=content_type)

    async def list_pages(self, resource: Resource[T], *, limit: int = 500) -> AsyncGenerator[Page[T], None]:
        """The pages of a complete list; the last page's `resource_version` is where to watch from.

        `limit`: objects per page, 0: all in one page. A page over the budget is asked for again with fewer objects,
        so that one tenant with huge slices still lists.
        Raises ApiError: TooLarge over `limits.list_bytes` or `list_objects`, Unreachable over `list_seconds`; Gone when
        paging took longer than etcd keeps history.
        """
        token, size, count = "", 0, 0
        deadline = asyncio.get_running_loop().time() + self.limits.list_seconds
        while True:
            if asyncio.get_running_loop().time() > deadline:
                raise self._unreachable(resource.path, f"the list took more than {self.limits.list_seconds:g} s")
            params = dict(resource.params)
            if limit:
                params["limit"] = str(limit)
            if token:
                params["continue"] = token
            try:
                body = await self.request("GET", resource.path, params=params)
            except TooLarge:
                if limit == 1:
                    raise
                limit = max(1, (limit or 4000) // 8)
                continue
            page = decode_list(resource, body, tenant=self.tenant, object_bytes=self.limits.object_bytes)
            size, count = size + len(body), count + len(page.objects) + len(page.errors)
            if size > self.limits.list_bytes or count > self.limits.list_objects:
                raise TooLarge(
                    tenant=self.tenant,
                    path=resource.path,
                    message=f"the list is over {self.limits.list_bytes} bytes or {self.limits.list_objects} objects",
                )
            yield page
            if not page.next_token:
                return
            if page.next_token == token:
                raise BadResponse(tenant=self.tenant, path=resource.path, message="the same continue token twice")
            token = page.next_token

    async def list_and_watch(
        self, resource: Resource[T], *, timeout_seconds: int
    ) -> AsyncGenerator[list[Line] | Page[T], None]:
        """A complete list as the beginning of a watch, in one request: see initial.py.

        First yields an empty list, once the server has accepted, and then for each part of the list that arrives one
        more; then the list, as one page; then as `watch`.
        Raises ApiError: TooLarge as `list_pages`; Unserved where the server has no such list.
        """
        limits, loop = self.limits, asyncio.get_running_loop()
        initial = Initial(
            resource,
            tenant=self.tenant,
            object_bytes=limits.object_bytes,
            list_bytes=limits.list_bytes,
            list_objects=limits.list_objects,
        )
        async with aclosing(self.watch(resource, resource_version=None, timeout_seconds=timeout_seconds)) as batches:
            try:
                yield await anext(batches)
            except BadResponse as error:
                if 400 <= error.status < 500:
                    raise self._unserved(resource.path, str(error)) from None
                raise
            deadline = loop.time() + limits.list_seconds
            while (rest := initial.take(await self._part(resource, batches))) is None:
                if loop.time() > deadline:
                    raise self._unserved(resource.path, f"a list without an end in {limits.list_seconds:g} s")
                yield []
            page = initial.page
            del initial
            yield page
            del page  # the watch may go on for minutes
            if rest:
                yield rest
            async for lines in batches:
                yield lines

    async def _part(self, resource: Resource[T], batches: AsyncGenerator[list[Line], None]) -> list[Line]:
        try:
            async with asyncio.timeout(self.limits.stalled_seconds):
                return await anext(batches)
        except TimeoutError:
            raise self._unserved(resource.path, "a list that has not ended, and nothing more comes") from None
        except StopAsyncIteration:
            raise self._unreachable(resource.path, "the stream ended before the list did") from None

    async def watch(
        self, resource: Resource[T], *, resource_version: str | None, timeout_seconds: int
    ) -> AsyncGenerator[list[Line], None]:
        """The lines of one watch, bookmarks included, as they arrive: each step yields at least one whole line.

        `resource_version`: where to begin; None: with all that there is, if the server knows that (`list_and_watch`).
        First yields an empty list, once the server has accepted the watch. Ends when the server ends the watch in
        good order. There is no deadline for silence between lines: put one around each step.
        Raises ApiError; Unreachable when the connection is lost or ends within a line.
        """
        begin = ALL_FIRST if resource_version is None else {"resourceVersion": resource_version}
        params = dict(resource.params) | begin
        params |= {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(timeout_seconds)}
        async with self._errors(resource.path):
            async with asyncio.timeout(self.limits.request_seconds):
                response = await self._send("GET", resource.path, params=params)
            try:
                yield []
                cutter = LineCutter(self.limits.object_bytes + 1024)  # the event's envelope
                async for chunk in response.content.iter_any():
                    lines = cutter.feed(chunk)
                    if lines:
                        yield lines
                if cutter.unfinished:
                    raise self._unreachable(resource.path, "the watch ended within a line")
            finally:
                response.close()  # never back to the pool: an unread remainder may follow

    # --- details

    async def _send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> aiohttp.ClientResponse:
        """Sends a request; the caller owns the response. Raises ApiError if the answer is not 2xx with JSON."""
        credentials = self.credentials
        token = self._token_file.read() if self._token_file else credentials.token
        response = await self._get_session().request(
            method,
            URL(credentials.server + path),
            params=params,
            data=body,
            headers={**(headers or {}), **({"Authorization": f"Bearer {token}"} if token else {})},
            allow_redirects=False,
            server_hostname=credentials.tls_server_name or None,
        )
        try:
            await self._judge(response, path)
        except BaseException:
            response.close()
            raise
        return response

    async def _judge(self, response: aiohttp.ClientResponse, path: str) -> None:
        status, kind = response.status, response.headers.get("Content-Type", "")
        if 300 <= status < 400:
            raise self._bad(path, "redirects are refused", status)
        if not 200 <= status < 300:
            body = await response.content.read(MAX_ERROR_BYTES)
            raise error_of_status(
                status,
                tenant=self.tenant,
                path=path,
                message=_said(body) or response.reason or "",
                retry_after=_retry_after(response),
            )
        if not kind.startswith("application/json"):
            raise self._bad(path, f"the answer is {printable(kind, 64) or 'of no type'}, not JSON", status)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise self._bad(path, "a compressed answer, though none was asked for", status)

    async def _read(self, response: aiohttp.ClientResponse, path: str) -> bytes:
        limit = self.limits.page_bytes
        parts: list[bytes] = []
        size = response.content_length or 0
        if size <= limit:
            size = 0
            async for chunk in response.content.iter_any():
                size += len(chunk)
                if size > limit:
                    break
                parts.append(chunk)
        if size > limit:
            response.close()
            raise TooLarge(tenant=self.tenant, path=path, message=f"the answer is over {limit} bytes")
        return b"".join(parts)

    @asynccontextmanager
    async def _errors(self, path: str) -> AsyncGenerator[None, None]:
        """Turns what the HTTP library, TLS and the operating system raise into ApiErrors."""
        try:
            yield
        except TimeoutError:
            raise self._unreachable(path, "no answer in time") from None
        except aiohttp.ClientPayloadError as error:
            raise self._unreachable(path, f"the answer was cut off: {error}") from None
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise self._unreachable(path, str(error) or type(error).__name__) from None
        except aiohttp.ClientResponseError as error:
            raise self._bad(path, f"not HTTP: {error.message}", 0) from None
        except (aiohttp.ClientError, ValueError) as error:
            raise self._bad(path, f"not HTTP: {error}", 0) from None
        except KubeconfigError as error:  # the token file vanished, or holds no token
            raise self._unreachable(path, str(error)) from None

    def _unreachable(self, path: str, message: str) -> ApiError:
        return Unreachable(tenant=self.tenant, path=path, message=message)

    def _unserved(self, path: str, message: str) -> ApiError:
        return Unserved(tenant=self.tenant, path=path, message=message)

    def _bad(self, path: str, message: str, status: int) -> ApiError:
        return BadResponse(tenant=self.tenant, path=path, message=message, status=status)

    def _get_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                ssl=self._tls,
                resolver=Resolver(self._look_up),
                limit=self.limits.connections,
                socket_factory=permitted_socket(self._permit),
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
                auto_decompress=False,
                read_bufsize=1 << 18,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.limits.connect_seconds),
                headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": USER_AGENT},
            )
        return self._session


class _Status(msgspec.Struct):
    message: str = ""


def _said(body: bytes) -> str:
    """What a failed request's answer says: the message of a Status object, or the beginning of whatever it is."""
    try:
        return msgspec.json.decode(body, type=_Status).message
    except UNDECODABLE:
        return " ".join(body.decode("utf-8", "replace").split())


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    """Seconds of a Retry-After header; API servers never send the form with a date."""
    text = response.headers.get("Retry-After", "")
    return min(float(text), MAX_RETRY_AFTER) if text.isascii() and text.isdigit() and len(text) < 10 else None
