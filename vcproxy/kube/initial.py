"""A complete list that a watch begins with (WatchList, KEP-3157), collected until the server says that it was all.

Asked for it (`sendInitialEvents`), an API server sends every object as ADDED, in no order of versions, then a BOOKMARK
that is annotated `k8s.io/initial-events-end: "true"` and has the version of the whole, then what changes. It reads the
objects from its watch cache and holds none of them for the answer, where a page is built in memory first. Served by
default from Kubernetes 1.34 on, and by 1.32 (apiserver, pkg/features/kube_features.go).

Nothing is a list without that bookmark. What comes before it is taken as a client of Kubernetes takes it (client-go,
tools/cache/reflector.go, handleAnyWatch): the last of several events of an object counts, and DELETED takes the object
away. What of it has a wrong shape is an error of the list, as in a page, and drops no good form that came before.

Who has no such list says so in several ways, all of which are `Unserved`:

- HTTP 422: the feature is off, or not known: from 1.19 to 1.26 `resourceVersionMatch` is forbidden in a watch
  (apimachinery, pkg/apis/meta/internalversion/validation). The client sees this before anything gets here.
- An ERROR event of code 500: etcd, or what stands in for it, cannot tell its progress (apiserver, storage/cacher).
- Another bookmark first. A kube-apiserver sends none before that one, so this is somebody who ignores what was asked.
- Nothing more, or changes without an end: the parameters were ignored, by an API server before 1.19 or one of other
  make, and the objects that came are the beginning of a plain watch. The client waits `Limits.stalled_seconds` for the
  next part, and `list_seconds` for the whole.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from vcproxy.kube.decode import Added, Bad, Bookmark, HasKey, Key, Page, Removed, Resource, decode_added, decode_line
from vcproxy.kube.errors import BadResponse, ServerError, ShapeError, TooLarge, Unserved
from vcproxy.kube.lines import Line, Oversized

T = TypeVar("T", bound=HasKey)

ALL_FIRST = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
"""What asks for it, in the query of a watch; without a version: the state of now, as a list from etcd has it."""
_ADDED = b'{"type":"ADDED",'


class Initial(Generic[T]):
    """One list. `object_bytes`, `list_bytes`, `list_objects`: as in the client's Limits; of all that was read counts
    every octet, of objects those that are held.
    """

    def __init__(
        self, resource: Resource[T], *, tenant: str, object_bytes: int, list_bytes: int, list_objects: int
    ) -> None:
        self._resource = resource
        self._tenant = tenant
        self._object_bytes, self._list_bytes, self._list_objects = object_bytes, list_bytes, list_objects
        self._size = 0
        self._version = ""
        self._objects: dict[Key, T] = {}
        self._errors: dict[Key, ShapeError] = {}
        self._nameless: list[ShapeError] = []

    @property
    def page(self) -> Page[T]:
        """The whole list, once it has ended."""
        errors = (*self._errors.values(), *self._nameless)
        return Page(tuple(self._objects.values()), errors, self._version, "")

    def take(self, lines: list[Line]) -> list[Line] | None:
        """The next lines; once the list has ended, those that are changes after it, before: None. Raises ApiError."""
        done, rest = self._take_added(lines), None
        for number, line in enumerate(lines[done:], done + 1):
            self._size += line.size if isinstance(line, Oversized) else len(line)
            if self._take(line):
                rest = lines[number:]
                break
        held = len(self._objects) + len(self._errors) + len(self._nameless)
        if self._size > self._list_bytes or held > self._list_objects:
            message = f"the list is over {self._list_bytes} bytes or {self._list_objects} objects"
            raise TooLarge(tenant=self._tenant, path=self._resource.path, message=message)
        return rest

    def _take_added(self, lines: list[Line]) -> int:
        """Takes those at the beginning that say ADDED, if nothing is wrong with any: twice as fast as one by one."""
        added: list[bytes] = []
        for line in lines:
            if isinstance(line, Oversized) or len(line) > self._object_bytes or not line.startswith(_ADDED):
                break
            added.append(line)
        objects = decode_added(self._resource, added)
        if objects is None:
            return 0
        self._size += sum(map(len, added))
        for found in objects:
            self._put(found)
        return len(added)

    def _put(self, found: T) -> None:
        key = found.key
        self._objects[key] = found
        if self._errors:
            self._errors.pop(key, None)

    def _take(self, line: Line) -> bool:
        try:
            event = decode_line(self._resource, line, tenant=self._tenant, object_bytes=self._object_bytes)
        except ServerError as error:
            if error.status == 500:
                raise self._unserved(error.message) from None
            raise
        match event:
            case Added(found):
                self._put(found)
            case Removed(key):
                self._objects.pop(key, None)
                self._errors.pop(key, None)
            case Bad(wrong):
                if wrong.key is None:
                    self._nameless.append(wrong)
                else:
                    self._errors[wrong.key] = wrong
            case Bookmark():
                self._end(event)
                return True
        return False

    def _end(self, mark: Bookmark) -> None:
        if not mark.ends_list:
            raise self._unserved("a bookmark before the one that ends the list")
        if mark.kind != self._resource.kind or not mark.resource_version:
            message = f"the end of a list of {mark.kind!r} at version {mark.resource_version!r}"
            raise BadResponse(tenant=self._tenant, path=self._resource.path, message=message)
        self._version = mark.resource_version

    def _unserved(self, message: str) -> Unserved:
        return Unserved(tenant=self._tenant, path=self._resource.path, message=message)
