"""A kube-apiserver small enough to start in a test, and able to lie.

Real HTTP over real TLS on loopback, one resourceVersion for everything, list with paging, watch with bookmarks,
create, update, patch, delete: of any kind, for the path says which. What a real API server computes (defaults,
ClusterIPs, endpoints) is not there: what a test puts in is what comes out.

    async with FakeApiServer() as api:
        api.put("Service", {"metadata": {"namespace": "demo", "name": "web"}, "spec": {...}})
        client = Client(api.credentials, tenant="acme")
        ...
        api.faults.append(Fault(html(502), path="/api/v1/services", times=3))
        await api.watching("Service")        # until somebody watches Services
        api.compact()                        # watches from before now are answered 410

Faults are looked up for every request, newest first. A fault's answer is a function of the request: those below, or a
test's own.
`api.watch_list` says what becomes of a watch that is asked to begin with a list (WatchList): "served", "refused" as by a
server that has it switched off, or "ignored": all objects come, as at the beginning of any watch without a version.
`api.absent` holds paths of collections that are not served, as before a CustomResourceDefinition is there.
`api.requests` has every request seen, as (verb, path, query), where verb is list, watch, get or the HTTP method.
"""

from __future__ import annotations

import asyncio
import base64
import bisect
import functools
import itertools
import json
import re
import ssl
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

import trustme
from aiohttp import web

from vcproxy.kube.kubeconfig import Credentials

Json = dict[str, Any]
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]

KINDS = {
    "Service": "/api/v1/services",
    "Pod": "/api/v1/pods",
    "Node": "/api/v1/nodes",
    "Namespace": "/api/v1/namespaces",
    "Secret": "/api/v1/secrets",
    "Event": "/api/v1/events",
    "EndpointSlice": "/apis/discovery.k8s.io/v1/endpointslices",
    "Lease": "/apis/coordination.k8s.io/v1/leases",
    "ServiceCIDR": "/apis/networking.k8s.io/v1/servicecidrs",
    "VirtualCluster": "/apis/tenancy.x-k8s.io/v1alpha1/virtualclusters",
}
_GROUP = re.compile(r"/apis/[^/]+/[^/]+")
_PATH = re.compile(r"(/api/v1|/apis/[^/]+/[^/]+)(?:/namespaces/([^/]+)(?=/))?/([^/]+)(?:/([^/]+))?(?:/status)?")


@dataclass(slots=True)
class Fault:
    """Answers requests whose path begins with `path` in the server's place.

    `verb`: list, watch, get, POST, ...; empty: any. `times`: how often, None: until removed from the server's list.
    """

    answer: Answer
    path: str = "/"
    verb: str = ""
    times: int | None = None


@dataclass(frozen=True, slots=True)
class _Change:
    """One write: the object before and after (None: not there), and as a deletion shows it."""

    before: Json | None
    after: Json | None
    shown: Json


@dataclass(slots=True, eq=False)
class _Watch:
    path: str
    namespace: str
    query: Mapping[str, str]
    queue: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)

    def line(self, change: _Change) -> bytes:
        """The event of a change as this watch sees it: what no longer matches its selectors is deleted for it."""
        before = change.before is not None and self.sees(change.before)
        after = change.after is not None and self.sees(change.after)
        if not (before or after):
            return b""
        return event("DELETED" if not after else "MODIFIED" if before else "ADDED", change.shown)

    def sees(self, value: Json) -> bool:
        """Whether an object matches what is asked for."""
        return self.namespace in ("", value["metadata"].get("namespace", "")) and selected(value, self.query)


@functools.cache
def _authority() -> trustme.CA:
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


class FakeApiServer:
    """See the module's docstring. `token`: the bearer token to ask for; `client_certificate`: ask for that instead."""

    def __init__(self, *, token: str = "s3cret", client_certificate: bool = False, history: int = 100_000) -> None:
        self.token = token
        self.faults: list[Fault] = []
        self.absent: set[str] = set()
        self.watch_list: Literal["served", "refused", "ignored"] = "served"
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.url = ""
        self._mutual = client_certificate
        self._history = history
        self._changed = asyncio.Event()
        self._watches: set[_Watch] = set()
        self._runner: web.AppRunner | None = None
        self._identity = _authority().issue_cert("admin@tenant") if client_certificate else None
        self.wipe()

    # --- life ---------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self, port: int = 0) -> None:
        """Listens on 127.0.0.1; port 0: any free one. After `stop`, the same port may be given again."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _authority().issue_cert("127.0.0.1", "localhost", "apiserver-svc.acme").configure_cert(context)
        if self._mutual:
            _authority().configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        app = web.Application(client_max_size=8 << 20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port, ssl_context=context)
        await site.start()
        self.url = f"https://127.0.0.1:{self._runner.addresses[0][1]}"

    @property
    def port(self) -> int:
        """The port it listens (or last listened) on."""
        return int(self.url.rpartition(":")[2])

    async def stop(self) -> None:
        """Closes the port and every connection, as a killed process would; the objects stay."""
        self.end_watches()
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    # --- credentials --------------------------------------------------------------------------------------------------

    @property
    def ca_pem(self) -> bytes:
        """The certificate that signed the server's."""
        return _authority().cert_pem.bytes()

    @property
    def credentials(self) -> Credentials:
        """What a client needs."""
        if self._identity is None:
            return Credentials(server=self.url, ca_pem=self.ca_pem, token=self.token)
        return Credentials(
            server=self.url,
            ca_pem=self.ca_pem,
            client_cert_pem=b"".join(blob.bytes() for blob in self._identity.cert_chain_pems),
            client_key_pem=self._identity.private_key_pem.bytes(),
        )

    def kubeconfig(self) -> bytes:
        """The same as a kubeconfig, the way VirtualCluster's tools write one."""
        credentials = self.credentials
        user = (
            {"token": credentials.token}
            if credentials.token
            else {
                "client-certificate-data": base64.b64encode(credentials.client_cert_pem).decode(),
                "client-key-data": base64.b64encode(credentials.client_key_pem).decode(),
            }
        )
        cluster = {"server": self.url, "certificate-authority-data": base64.b64encode(self.ca_pem).decode()}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tenant", "cluster": cluster}],
            "users": [{"name": "admin", "user": user}],
            "contexts": [{"name": "default", "context": {"cluster": "tenant", "user": "admin"}}],
            "current-context": "default",
        }
        return b"\n" + json.dumps(document, indent=1).encode()

    # --- the store ----------------------------------------------------------------------------------------------------

    def put(self, kind: str, value: Mapping[str, Any], *, path: str = "") -> Json:
        """Adds or replaces an object, and tells the watches; returns it with uid and resourceVersion."""
        path = path or KINDS[kind]
        metadata = dict(value["metadata"])
        key = (str(metadata.get("namespace", "")), str(metadata["name"]))
        kept = self._objects.setdefault(path, {})
        old = kept.get(key)
        metadata.setdefault("uid", old["metadata"]["uid"] if old else str(uuid.uuid4()))
        metadata["resourceVersion"] = str(self._next())
        stored = {"kind": kind, **value, "metadata": metadata}
        self._kinds[path] = kind
        kept[key] = stored
        self._tell(path, _Change(old, stored, stored))
        return stored

    def delete(self, kind: str, namespace: str, name: str, *, path: str = "") -> None:
        """Removes an object, and tells the watches. Raises KeyError."""
        path = path or KINDS[kind]
        gone = self._objects[path].pop((namespace, name))
        gone = {**gone, "metadata": {**gone["metadata"], "resourceVersion": str(self._next())}}
        self._tell(path, _Change(gone, None, gone))

    def objects(self, kind: str, *, path: str = "") -> list[Json]:
        """All objects of a kind, ordered by key."""
        return [value for _, value in sorted(self._objects.get(path or KINDS[kind], {}).items())]

    @property
    def resource_version(self) -> int:
        """The last one given out."""
        return self._version

    def compact(self) -> None:
        """Forgets history: whoever watches or pages from before now is told 410. Watches that are open go on."""
        self._log.clear()
        self._compacted = self._version

    def wipe(self) -> None:
        """Empties the store and starts resourceVersions again, as an etcd that lost its disk; open watches end."""
        self._version = 0
        self._compacted = 0
        self._objects: dict[str, dict[tuple[str, str], Json]] = {}
        self._kinds: dict[str, str] = {path: kind for kind, path in KINDS.items()}
        self._log: list[tuple[int, str, _Change]] = []  # (version, path, change)
        self.end_watches()

    def _next(self) -> int:
        self._version += 1
        return self._version

    def _tell(self, path: str, change: _Change) -> None:
        self._log.append((self._version, path, change))
        if len(self._log) > self._history:
            self._compacted = self._log[len(self._log) // 2][0]
            del self._log[: len(self._log) // 2 + 1]
        for watch in self._watches:
            if watch.path == path and (line := watch.line(change)):
                watch.queue.put_nowait(line)

    def define(self, kind: str, path: str) -> None:
        """Serve a kind of its own, as with a CustomResourceDefinition."""
        self._kinds[path] = kind

    # --- watches ------------------------------------------------------------------------------------------------------

    def send(self, kind: str, line: bytes) -> None:
        """Sends raw bytes to the open watches of a kind."""
        for watch in self._watches:
            if watch.path == KINDS[kind]:
                watch.queue.put_nowait(line)

    def bookmark(self, kind: str) -> None:
        """Sends a bookmark with the current resourceVersion to the open watches of a kind."""
        self.send(kind, event("BOOKMARK", {"kind": kind, "metadata": {"resourceVersion": str(self._version)}}))

    def end_watches(self, kind: str = "") -> None:
        """Ends the open watches (of one kind) in good order; they no longer count as open."""
        for watch in list(self._watches):
            if not kind or watch.path == KINDS[kind]:
                self._watches.discard(watch)
                watch.queue.put_nowait(None)

    async def watching(self, kind: str, count: int = 1) -> None:
        """Waits until so many watches of a kind are open."""
        await self.until(lambda: sum(watch.path == KINDS[kind] for watch in self._watches) >= count)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until a condition holds; it is looked at after every request and every watch that opens or closes."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        match = _PATH.fullmatch(request.path)
        verb = request.method
        if verb == "GET" and match is not None and match[4] is None:
            verb = "watch" if request.query.get("watch") in ("true", "1") else "list"
        elif verb == "GET":
            verb = "get"
        self.requests.append((verb, request.path, dict(request.query)))
        self._changed.set()
        for fault in reversed(self.faults):
            if request.path.startswith(fault.path) and fault.verb in ("", verb) and fault.times != 0:
                if fault.times is not None:
                    fault.times -= 1
                return await fault.answer(request)
        if not self._mutual and request.headers.get("Authorization") != f"Bearer {self.token}":
            return failure(401, "Unauthorized")
        if _GROUP.fullmatch(request.path):
            return self._discover(request.path)
        if match is None or f"{match[1]}/{match[3]}" in self.absent:
            return failure(404, "the server could not find the requested resource")
        prefix, namespace, plural, name = match.groups()
        path = f"{prefix}/{plural}"
        if verb in ("list", "watch") and path not in self._kinds:
            return failure(404, "the server could not find the requested resource")
        match verb:
            case "list":
                return self._list(request, path, namespace or "")
            case "watch":
                return await self._watch(request, path, namespace or "")
            case "get":
                found = self._objects.get(path, {}).get((namespace or "", name))
                return failure(404, f"{plural} {name!r} not found") if found is None else _json(found)
            case _:
                return await self._write(request, path, namespace or "", name)

    def _discover(self, group: str) -> web.StreamResponse:
        """The resources of one group and version."""
        served = [path for path in self._kinds if path.startswith(f"{group}/") and path not in self.absent]
        if not served:
            return failure(404, "the server could not find the requested resource")
        resources = [{"name": path.rpartition("/")[2], "kind": self._kinds[path]} for path in served]
        return _json({"kind": "APIResourceList", "groupVersion": group.removeprefix("/apis/"), "resources": resources})

    def _list(self, request: web.Request, path: str, namespace: str) -> web.StreamResponse:
        kept = self._objects.get(path, {})
        keys = sorted(key for key in kept if namespace in ("", key[0]) and selected(kept[key], request.query))
        version = self._version
        if token := request.query.get("continue"):
            version, after = json.loads(base64.b64decode(token))
            if version < self._compacted:
                return failure(410, "The provided continue parameter is too old", reason="Expired")
            keys = keys[bisect.bisect_right(keys, tuple(after)) :]
        metadata = {"resourceVersion": str(version)}
        limit = int(request.query.get("limit", "0"))
        if limit and len(keys) > limit:
            keys = keys[:limit]
            metadata["continue"] = base64.b64encode(json.dumps([version, keys[-1]]).encode()).decode()
        items = [{k: v for k, v in kept[key].items() if k not in ("kind", "apiVersion")} for key in keys]
        return _json({"kind": f"{self._kinds.get(path, 'Object')}List", "metadata": metadata, "items": items})

    async def _watch(self, request: web.Request, path: str, namespace: str) -> web.StreamResponse:
        since = int(request.query.get("resourceVersion") or self._version)
        if since < self._compacted:
            return failure(410, f"too old resource version: {since}", reason="Expired")
        response = _stream()
        watch = _Watch(path, namespace, request.query)
        if request.query.get("sendInitialEvents") == "true":
            if self.watch_list == "refused" or request.query.get("resourceVersionMatch") != "NotOlderThan":
                return failure(422, "sendInitialEvents: Forbidden", reason="Invalid")
            for value in self.objects(self._kinds[path], path=path):
                if watch.sees(value):
                    watch.queue.put_nowait(event("ADDED", value))
            if self.watch_list == "served":
                watch.queue.put_nowait(end_of_list(self._kinds[path], self._version))
        first = bisect.bisect_right(self._log, since, key=lambda entry: entry[0])
        for _, where, change in itertools.islice(self._log, first, None):
            if where == path and (line := watch.line(change)):
                watch.queue.put_nowait(line)
        self._watches.add(watch)
        try:
            await response.prepare(request)
            self._changed.set()
            async with asyncio.timeout(float(request.query.get("timeoutSeconds", "300"))):
                while (sent := await watch.queue.get()) is not None:
                    await response.write(sent)
        except (TimeoutError, ConnectionError):
            pass  # the end that was asked for, or a reader that left
        finally:
            self._watches.discard(watch)
            self._changed.set()
        return response

    async def _write(self, request: web.Request, path: str, namespace: str, name: str | None) -> web.StreamResponse:
        kept = self._objects.setdefault(path, {})
        if request.method == "DELETE":
            gone = kept.get((namespace, name or ""))
            if gone is None:
                return failure(404, f"{name!r} not found")
            wanted = (json.loads(await request.read() or b"{}").get("preconditions") or {}).get("resourceVersion")
            if wanted not in (None, gone["metadata"]["resourceVersion"]):
                return failure(409, f"{name!r} is another one", reason="Conflict")
            self.delete(gone["kind"], namespace, name or "", path=path)
            return _json(gone)
        body = await request.json()
        if request.method == "POST":
            metadata = {"namespace": namespace, **body["metadata"]} if namespace else body["metadata"]
            metadata.setdefault("name", f"{metadata.get('generateName', '')}{uuid.uuid4().hex[:5]}")
            if (namespace, metadata["name"]) in kept:
                return failure(409, f"{metadata['name']!r} already exists", reason="AlreadyExists")
            kind = body.get("kind") or self._kinds.get(path, "Object")
            return _json(self.put(kind, {**body, "metadata": metadata}, path=path), status=201)
        old = kept.get((namespace, name or ""))
        if old is None:
            return failure(404, f"{name!r} not found")
        wanted = body["metadata"].get("resourceVersion") if request.method == "PUT" else None
        if wanted not in (None, old["metadata"]["resourceVersion"]):
            return failure(409, f"{name!r} has been modified", reason="Conflict")
        new = _merge(old, body) if request.method == "PATCH" else {**body, "metadata": {**body["metadata"]}}
        return _json(self.put(old["kind"], new, path=path))


# --- answers of a server that is unwell, or lies --------------------------------------------------------------------


def failure(status: int, message: str, *, reason: str = "", headers: Mapping[str, str] | None = None) -> web.Response:
    """The Status object of a failed request."""
    body = {"kind": "Status", "status": "Failure", "message": message, "reason": reason, "code": status}
    return _json(body, status=status, headers=headers)


def fail(status: int, message: str = "injected", **headers: str) -> Answer:
    """A Status with this code; headers in Python's spelling (`Retry_After="7"`)."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return failure(status, message, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return answer


def html(status: int) -> Answer:
    """A page of a proxy that stands in front of an API server."""
    return body(b"<html><body><h1>Bad Gateway</h1></body></html>", status=status, content_type="text/html")


def redirect(target: str) -> Answer:
    """302 to another place."""
    return body(b"", status=302, headers={"Location": target})


def body(
    data: bytes,
    *,
    status: int = 200,
    content_type: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Exactly these bytes, as a complete answer."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=data, status=status, headers={"Content-Type": content_type, **(headers or {})})

    return answer


def stream(*chunks: bytes, then: str = "end") -> Answer:
    """A chunked answer; `then` says how it goes on: "end" in good order, "hang" in silence, "cut" the connection."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = _stream()
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
        await _then(request, then)
        return response

    return answer


def hang() -> Answer:
    """Not even a header."""

    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    return answer


def cut() -> Answer:
    """Closes the connection without an answer."""

    async def answer(request: web.Request) -> web.StreamResponse:
        await _then(request, "cut")
        return web.Response()

    return answer


def drip(chunk: bytes = b" ", *, every: float = 0.005) -> Answer:
    """A few bytes now and then, and never the end."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = _stream()
        await response.prepare(request)
        while True:
            await response.write(chunk)
            await asyncio.sleep(every)

    return answer


async def _then(request: web.Request, what: str) -> None:
    if what == "hang":
        await asyncio.Event().wait()
    if what == "cut" and request.transport is not None:
        request.transport.abort()


def _stream() -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    response.enable_chunked_encoding()
    return response


def _json(value: Json, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    kind = {"Content-Type": "application/json"}
    return web.Response(body=_dump(value), status=status, headers={**kind, **(headers or {})})


def _dump(value: Json) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()  # the spelling of Go's encoder


def _merge(old: Json, patch: Json) -> Json:
    """RFC 7386."""
    merged = dict(old)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            merged[key] = _merge(merged.get(key) or {}, value)
        else:
            merged[key] = value
    return merged


def event(kind: str, value: Json) -> bytes:
    """A line of a watch."""
    return b'{"type":"%s","object":%s}\n' % (kind.encode(), _dump(value))


def end_of_list(kind: str, version: int | str) -> bytes:
    """The line that ends the list that a watch begins with."""
    metadata = {"resourceVersion": str(version), "annotations": {"k8s.io/initial-events-end": "true"}}
    return event("BOOKMARK", {"kind": kind, "metadata": metadata})


def selected(value: Json, query: Mapping[str, str]) -> bool:
    """Whether an object matches a labelSelector (`key`, `!key`, `key=value`, `key!=value`) and a fieldSelector
    (`a.b=value`, `a.b!=value`).
    """
    labels = value["metadata"].get("labels") or {}
    for term in filter(None, query.get("labelSelector", "").split(",")):
        if term.startswith("!"):
            if term[1:] in labels:
                return False
            continue
        key, operator, wanted = _term(term)
        if key not in labels if not operator else (labels.get(key) == wanted) != (operator == "="):
            return False
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        key, operator, wanted = _term(term)
        found: Any = value
        for part in key.split("."):
            found = found.get(part, "") if isinstance(found, dict) else ""
        if (found == wanted) != (operator == "="):
            return False
    return True


def _term(term: str) -> tuple[str, str, str]:
    operator = "!=" if "!=" in term else "=" if "=" in term else ""
    key, _, wanted = term.partition(operator) if operator else (term, "", "")
    return key, operator, wanted
