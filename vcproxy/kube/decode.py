"""Bytes of an API server to typed objects, one bad object at a time.

A list and a watch carry many objects in one stream of bytes, and a single field of a wrong type must cost that object
only. So a list is decoded in one typed pass, and only if that fails (or the page is so large that an object in it
could be over the limit) item by item from the raw JSON; a watch line whose object does not decode is taken apart
likewise. Whatever is not JSON at all, or not the list that was asked for, is a `BadResponse`: `{}` with status 200 is
not an empty list.

`Resource` ties a kind to its path and shape. Sources of tenants define their own with their own shapes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, Protocol, TypeVar
from urllib.parse import quote

import msgspec

from vcproxy.kube import shapes
from vcproxy.kube.errors import ApiError, BadResponse, ShapeError, error_of_status, printable
from vcproxy.kube.lines import Line, Oversized

Key = tuple[str, str]
"""(namespace, name); the namespace is empty for cluster-scoped kinds."""


class HasKey(Protocol):
    """What a decoded object must have: Kubernetes' identity of it."""

    @property
    def key(self) -> Key:
        """(namespace, name)."""

    @property
    def metadata(self) -> Any:
        """Has at least `name`, `namespace`, `uid` and `resource_version`."""


T = TypeVar("T", bound=HasKey)

UNDECODABLE = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)
"""All that msgspec raises for bytes that are not the JSON they should be."""


@dataclass(frozen=True, slots=True)
class Resource(Generic[T]):
    """A kind of object: `kind` as objects call themselves, the `path` of the collection, the `shape` to decode into.

    `params` are query parameters for list and watch alike (`labelSelector`, `fieldSelector`).
    """

    kind: str
    path: str
    shape: type[T]
    params: Mapping[str, str] = field(default_factory=dict)

    def within(self, namespace: str) -> Resource[T]:
        """The same kind in one namespace; "" for all."""
        if not namespace:
            return self
        head, _, plural = self.path.rpartition("/")
        return replace(self, path=f"{head}/namespaces/{quote(namespace, safe='')}/{plural}")


# What somebody else proxies, and endpoints of headless Services, need not travel. Who reads them checks again.
SERVICES = Resource(
    "Service", "/api/v1/services", shapes.Service, {"labelSelector": "!service.kubernetes.io/service-proxy-name"}
)
ENDPOINT_SLICES = Resource(
    "EndpointSlice",
    "/apis/discovery.k8s.io/v1/endpointslices",
    shapes.EndpointSlice,
    {"labelSelector": "!service.kubernetes.io/headless"},
)
PODS = Resource("Pod", "/api/v1/pods", shapes.Pod)
NODES = Resource("Node", "/api/v1/nodes", shapes.Node)
NAMESPACES = Resource("Namespace", "/api/v1/namespaces", shapes.Namespace)
SERVICE_CIDRS = Resource("ServiceCIDR", "/apis/networking.k8s.io/v1/servicecidrs", shapes.ServiceCIDR)


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list: the good objects, the bad ones' errors, the list's resourceVersion, and the token of the
    next page.
    """

    objects: tuple[T, ...]
    errors: tuple[ShapeError, ...]
    resource_version: str
    next_token: str


@dataclass(frozen=True, slots=True)
class Added(Generic[T]):
    """ADDED or MODIFIED: the object as it is now."""

    object: T
    resource_version: str


@dataclass(frozen=True, slots=True)
class Removed:
    """DELETED: the object's identity; `resource_version` is that of the deletion."""

    key: Key
    uid: str
    resource_version: str


@dataclass(frozen=True, slots=True)
class Bookmark:
    """BOOKMARK: everything up to this resourceVersion has been sent. `kind`: of the objects; `ends_list`: they were the
    complete list that a stream begins with.
    """

    resource_version: str
    kind: str
    ends_list: bool


@dataclass(frozen=True, slots=True)
class Bad:
    """An event whose object has a wrong shape; `resource_version` is "" where it could not be read."""

    error: ShapeError
    resource_version: str


WatchEvent = Added[T] | Removed | Bookmark | Bad


def decode_list(resource: Resource[T], body: bytes, *, tenant: str, object_bytes: int) -> Page[T]:
    """Decodes one page. Objects of a wrong shape, or of more than `object_bytes` of JSON, become errors of the page.

    Raises BadResponse if the body as a whole is not a list of this kind.
    """
    if len(body) <= object_bytes:
        try:
            typed = _list_decoder(resource.shape).decode(body)
        except UNDECODABLE:
            pass  # the slow path finds out which object it was, or that it is no list at all
        else:
            _check_list(resource, typed.kind, typed.metadata, tenant)
            return Page(typed.items or (), (), typed.metadata.resource_version, typed.metadata.continue_)
    try:
        raw = _RAW_LIST.decode(body)
    except UNDECODABLE as error:
        raise _bad(resource, tenant, f"not a list: {error}: {_head(body)}") from None
    _check_list(resource, raw.kind, raw.metadata, tenant)
    objects: list[T] = []
    errors: list[ShapeError] = []
    for item in raw.items or ():
        try:
            objects.append(_decode(resource, item, tenant, object_bytes))
        except ShapeError as error:
            errors.append(error)
    return Page(tuple(objects), tuple(errors), raw.metadata.resource_version, raw.metadata.continue_)


def decode_event(resource: Resource[T], line: bytes, *, tenant: str, object_bytes: int) -> WatchEvent[T]:
    """Decodes one line of a watch.

    API servers write `{"type":"MODIFIED","object":...}` with exactly these bytes, so the object is usually decoded in
    place; that saves a second pass over its JSON, a third of the time. Any other spelling of an event takes the
    longer way.

    Raises the typed error of an ERROR event (usually Gone), and BadResponse for a line that is no event.
    """
    for prefix in _USUAL:
        if line.startswith(prefix) and len(line) <= object_bytes:
            try:
                shaped: T = _object_decoder(resource.shape).decode(memoryview(line)[len(prefix) : -1])
            except UNDECODABLE:
                break  # the longer way says what is wrong with it
            return Added(shaped, shaped.metadata.resource_version)
    try:
        event = _EVENT.decode(line)
    except UNDECODABLE as error:
        raise _bad(resource, tenant, f"not a watch event: {error}: {_head(line)}") from None
    try:
        match event.type:
            case "ADDED" | "MODIFIED":
                shaped = _decode(resource, event.object, tenant, object_bytes)
                return Added(shaped, shaped.metadata.resource_version)
            case "DELETED":  # needs the identity only: an object that can no longer be read can still go
                gone = _decode_as(_OBJECT, resource, event.object, tenant).metadata
                return Removed((gone.namespace, gone.name), gone.uid, gone.resource_version)
            case "BOOKMARK":
                mark = _decode_as(_BOOKMARK, resource, event.object, tenant)
                metadata = mark.metadata
                return Bookmark(metadata.resource_version, mark.kind, metadata.annotations.ends_list == "true")
            case "ERROR":
                raise _status_error(resource, event.object, tenant)
            case other:
                raise _bad(resource, tenant, f"unknown type of watch event: {printable(other, 32)!r}")
    except ShapeError as error:
        return Bad(error, _peek(event.object)[1])


def decode_added(resource: Resource[T], lines: Sequence[bytes]) -> list[T] | None:
    """The objects of lines that all say ADDED, decoded in one go; None where that is not so, or any is wrong.

    As many events as lines, of which none holds two (msgspec refuses that): so each has a line of its own.
    """
    try:
        events = _added_decoder(resource.shape).decode_lines(b"\n".join(lines))
    except UNDECODABLE:
        return None
    return [event.object for event in events] if len(events) == len(lines) else None


def decode_line(resource: Resource[T], line: Line, *, tenant: str, object_bytes: int) -> WatchEvent[T]:
    """As `decode_event`; a line that was not read to its end, since it was too long, is Bad."""
    if not isinstance(line, Oversized):
        return decode_event(resource, line, tenant=tenant, object_bytes=object_bytes)
    namespace = re.search(rb'"namespace"\s*:\s*"([^"\\]{1,63})"', line.head)
    name = re.search(rb'"name"\s*:\s*"([^"\\]{1,253})"', line.head)
    key = (_latin(namespace), _latin(name)) if name else None
    reason = f"{line.size} bytes of JSON, more than the limit of {object_bytes}"
    return Bad(ShapeError(tenant=tenant, kind=resource.kind, key=key, field="$", reason=reason), "")


# --- details ---------------------------------------------------------------------------------------------------------


class _ListMeta(shapes.Shape, frozen=True):
    resource_version: str = ""
    continue_: str = ""


class _ListOf(msgspec.Struct, Generic[T], gc=False):
    metadata: _ListMeta
    items: tuple[T, ...] | None
    kind: str = ""


class _RawList(msgspec.Struct, gc=False):
    metadata: _ListMeta
    items: list[msgspec.Raw] | None
    kind: str = ""


class _Event(msgspec.Struct, gc=False):
    type: str
    object: msgspec.Raw


class _AddedEvent(msgspec.Struct, Generic[T], gc=False):
    type: Literal["ADDED"]
    object: T


class _BookmarkAnnotations(msgspec.Struct, gc=False, rename={"ends_list": "k8s.io/initial-events-end"}):
    ends_list: str = ""


class _BookmarkMeta(shapes.Shape, frozen=True):
    resource_version: str = ""
    annotations: _BookmarkAnnotations = msgspec.field(default_factory=_BookmarkAnnotations)


class _BookmarkObject(msgspec.Struct, gc=False):
    metadata: _BookmarkMeta
    kind: str = ""


class _Status(shapes.Shape, frozen=True):
    message: str = ""
    reason: str = ""
    code: int = 0


class _AnyObject(msgspec.Struct, gc=False):
    metadata: dict[str, Any]


_USUAL = (b'{"type":"MODIFIED","object":', b'{"type":"ADDED","object":')
_RAW_LIST = msgspec.json.Decoder(_RawList)
_EVENT = msgspec.json.Decoder(_Event)
_OBJECT = msgspec.json.Decoder(shapes.Object)
_BOOKMARK = msgspec.json.Decoder(_BookmarkObject)
_STATUS = msgspec.json.Decoder(_Status)
_ANY_OBJECT = msgspec.json.Decoder(_AnyObject)


@functools.cache
def _list_decoder(shape: type[Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(_ListOf[shape])  # type: ignore[valid-type]


@functools.cache
def _object_decoder(shape: type[Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(shape)


@functools.cache
def _added_decoder(shape: type[Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(_AddedEvent[shape])  # type: ignore[valid-type]


def _decode(resource: Resource[T], raw: msgspec.Raw, tenant: str, object_bytes: int) -> T:
    size = memoryview(raw).nbytes
    if size > object_bytes:
        reason = f"{size} bytes of JSON, more than the limit of {object_bytes}"
        raise ShapeError(tenant=tenant, kind=resource.kind, key=_peek(raw)[0], field="$", reason=reason)
    shaped: T = _decode_as(_object_decoder(resource.shape), resource, raw, tenant)
    return shaped


def _decode_as(decoder: msgspec.json.Decoder[Any], resource: Resource[T], raw: msgspec.Raw, tenant: str) -> Any:
    try:
        return decoder.decode(raw)
    except UNDECODABLE as error:
        reason, _, path = str(error).partition(" - at `")
        where = printable(path.rstrip("`"), 128) or "$"
        raise ShapeError(tenant=tenant, kind=resource.kind, key=_peek(raw)[0], field=where, reason=reason) from None


def _peek(raw: msgspec.Raw) -> tuple[Key | None, str]:
    """(key, resourceVersion) of an object whose shape is wrong elsewhere; None and "" for what cannot be read."""
    try:
        metadata = _ANY_OBJECT.decode(raw).metadata
    except UNDECODABLE:
        return None, ""
    namespace, name, version = (metadata.get(field, "") for field in ("namespace", "name", "resourceVersion"))
    key = (namespace, name) if isinstance(namespace, str) and isinstance(name, str) and name else None
    return key, version if isinstance(version, str) else ""


def _check_list(resource: Resource[T], kind: str, metadata: _ListMeta, tenant: str) -> None:
    if kind != f"{resource.kind}List":
        raise _bad(resource, tenant, f"not a {resource.kind}List but {printable(kind, 64)!r}")
    if not metadata.resource_version:
        raise _bad(resource, tenant, "a list without resourceVersion")


def _status_error(resource: Resource[T], raw: msgspec.Raw, tenant: str) -> ApiError:
    try:
        status = _STATUS.decode(raw)
    except UNDECODABLE:
        return _bad(resource, tenant, "an ERROR event without Status")
    code = 410 if status.reason in ("Expired", "Gone") else status.code
    return error_of_status(code, tenant=tenant, path=resource.path, message=status.message or status.reason)


def _bad(resource: Resource[T], tenant: str, message: str) -> BadResponse:
    return BadResponse(tenant=tenant, path=resource.path, message=message)


def _head(body: bytes) -> str:
    return printable(body[:80].decode("utf-8", "replace"), 80)


def _latin(match: re.Match[bytes] | None) -> str:
    return printable(match[1].decode("utf-8", "replace"), 253) if match else ""
