"""Tenants whose control planes a project hosts in the super cluster: objects, Secrets, and what follows from them.

- Identity is the object's uid. An object made again under the same name is another tenant.
- Nothing is said before every kind has been listed completely: what is half known would look like tenants without
  access, pods without an owner, Services without an alias. A kind that is not served, or that may not be read, is a
  problem with a cure, and the source waits.
- A tenant is gone when its object is: deleted before our eyes, or missing from a complete list. A Secret that is
  missing or bad, a phase that fell back, an API server that does not answer take nothing away.
- Rotation shows in the Secret alone, so Secrets are followed: all of them in one watch where the project's have a
  common name, type or label; one that a user named by himself, in a watch of its own.

An event costs what it concerns: an object, or the objects that one Secret serves.
"""

import asyncio
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import msgspec

from vcproxy.brain.sources import Problem, SourceComplete, SourceSink, TenantFound, TenantGone
from vcproxy.brain.sources.attribution import NAME, Owners
from vcproxy.brain.sources.collection import Collection
from vcproxy.brain.sources.project import SECRETS, Project, Secret, Unready, decode_kubeconfig
from vcproxy.brain.superaccess import UNRATIONED, SuperAccess
from vcproxy.kube.backoff import Backoff
from vcproxy.kube.decode import HasKey, Key, Resource
from vcproxy.kube.errors import ApiError, Forbidden, KubeconfigError, NotFound, printable
from vcproxy.kube.kubeconfig import Credentials, load_kubeconfig
from vcproxy.kube.reflector import Broken, Event, Listed, Recovered, Timing
from vcproxy.ops import logs
from vcproxy.ops.stopping import heeded

T = TypeVar("T", bound=HasKey)
V = TypeVar("V")

RETRY_SECONDS = 10.0
"""The longest wait between attempts: there is one super cluster, and nobody waits for it with a thousand others."""
TIMING = Timing(backoff_cap=RETRY_SECONDS, share=UNRATIONED.share)

_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9](?:[-a-z0-9.]*[a-z0-9])?")
_log = logs.get("sources")


class Follower(Protocol):
    """Wants further kinds of the super cluster to be read together with a source's."""

    @property
    def resources(self) -> Sequence[Resource[Any]]:
        """The kinds; none of them the source's own, nor Secrets."""

    def take(self, kind: str, event: Event[Any]) -> None:
        """One event."""


class HostedTenants(Generic[T]):
    """Source of one project's tenants. `namespaces`: where their objects and Secrets are; () for all."""

    def __init__(
        self,
        project: Project[T],
        access: SuperAccess,
        owners: Owners,
        *,
        namespaces: Sequence[str] = (),
        followers: Sequence[Follower] = (),
        timing: Timing = TIMING,
    ) -> None:
        self._project = project
        self._access = access
        self._owners = owners
        self._scopes = tuple(namespaces) or ("",)
        self._followers = {resource.kind: follower for follower in followers for resource in follower.resources}
        self._further = tuple(resource for follower in followers for resource in follower.resources)
        self._timing = timing
        self._sink: SourceSink = lambda event: None
        self._objects: dict[str, Collection[T, T]] = {scope: Collection(_itself) for scope in self._scopes}
        self._secrets: dict[str, Collection[Secret, Secret]] = {}  # by scope, or by "namespace/name" of a single one
        self._wanted: dict[Key, set[Key]] = {}  # Secret -> objects of the tenants that it serves
        self._single: dict[Key, asyncio.Task[NoReturn]] = {}
        self._said: dict[str, Credentials | None] = {}
        self._faults: dict[str, Problem] = {}  # of tenants, by uid
        self._broken: dict[tuple[str, str], Broken] = {}
        self._waiting: set[tuple[str, str]] = set()
        self._missing = ""
        self._complete = False
        self._lost = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None

    def problems(self) -> list[Problem]:
        """What is missing or may not be read, and tenants whose access cannot be used."""
        title = self._project.title
        found = [Problem(title, self._missing)] if self._missing else []
        found.extend(Problem(title, _broken(kind, event.error)) for (_, kind), event in self._broken.items())
        for collection in self._objects.values():
            cure = "correct it; until then no tenant that nobody names counts as gone"
            found.extend(Problem(title, f"{key or 'an object'} cannot be read; {cure}") for key in collection.unread)
        return [*found, *self._faults.values()]

    async def run(self, sink: SourceSink) -> NoReturn:
        """Tell of tenants for ever."""
        self._sink = sink
        while True:
            objects = await self._served()
            self._lost.clear()
            try:
                await heeded(self._until_lost(objects))
            except* _Lost:
                pass
            finally:
                self._group = None
                self._single.clear()

    async def _until_lost(self, objects: Resource[T]) -> None:
        async with asyncio.TaskGroup() as group:
            self._group = group
            self._follow(group, objects)
            await self._lost.wait()
            raise _Lost

    def _follow(self, group: asyncio.TaskGroup, objects: Resource[T]) -> None:
        self._broken.clear()
        self._waiting = set()
        for number, scope in enumerate(self._scopes):
            own: list[Resource[Any]] = [objects.within(scope), self._project.secrets.within(scope)]
            further = self._further if number == 0 else ()
            self._waiting |= {(scope, resource.kind) for resource in (*own, *further)}
            source = self._access.input((*own, *further), timing=self._timing)
            group.create_task(source.run(partial(self._take, scope)))
        for secret in self._wanted:
            self._follow_single(secret)

    # --- what is served -----------------------------------------------------------------------------------------------

    async def _served(self) -> Resource[T]:
        """The objects' collection in the newest version that the API server has. Waits until there is one."""
        project = self._project
        if not project.group:
            return project.objects
        backoff = Backoff(base=0.5, cap=RETRY_SECONDS, uniform=random.uniform)
        while True:
            try:
                if version := await self._version():
                    self._missing = ""
                    return replace(project.objects, path=f"/apis/{project.group}/{version}/{project.plural}")
                crd = f"{project.plural}.{project.group}"
                self._missing = f"the super cluster has no CustomResourceDefinition {crd} of version " + (
                    f"{' or '.join(project.versions)}; install {project.title}, or remove it from tenants.sources"
                )
            except ApiError as error:
                self._missing = f"the super cluster does not say what it serves: {error}"
            await asyncio.sleep(backoff.next())

    async def _version(self) -> str:
        project, client = self._project, self._access.client
        for version in project.versions:
            try:
                served = await client.get_json(f"/apis/{project.group}/{version}", _Served)
            except NotFound:
                continue
            if any(resource.name == project.plural for resource in served.resources):
                return version
        return ""

    # --- events -------------------------------------------------------------------------------------------------------

    def _take(self, scope: str, kind: str, event: Event[Any]) -> None:
        project = self._project
        match event:
            case Broken():
                self._broken[scope, kind] = event
                if kind == project.objects.kind and isinstance(event.error, NotFound) and project.group:
                    self._lost.set()
                return
            case Recovered():
                self._broken.pop((scope, kind), None)
                return
        if kind == project.objects.kind:
            self._take_objects(scope, event)
        elif kind == "Secret":
            self._take_secrets(scope, event)
        else:
            self._followers[kind].take(kind, event)
        if isinstance(event, Listed):
            self._waiting.discard((scope, kind))
        if not self._complete and not self._waiting and not any(held.unread for held in self._objects.values()):
            self._complete = True
            for found in self._all():
                self._tell(found)
            self._sink(SourceComplete())

    def _take_objects(self, scope: str, event: Event[T]) -> None:
        for key, old, new in self._objects[scope].take(event):
            if old is not None:
                self._unwant(key, old, new)
            if new is None:
                assert old is not None
                self._gone(old)
            else:
                self._want(key, new)
                self._tell(new)

    def _take_secrets(self, scope: str, event: Event[Secret]) -> None:
        for key, _, _ in self._secrets.setdefault(scope, Collection(_itself)).take(event):
            for wanting in sorted(self._wanted.get(key, ())):
                for collection in self._objects.values():
                    if wanting in collection.values:
                        self._tell(collection.values[wanting])

    def _all(self) -> Iterable[T]:
        return [found for collection in self._objects.values() for found in collection.values.values()]

    # --- Secrets ------------------------------------------------------------------------------------------------------

    def _secret_of(self, found: T) -> Key | None:
        try:
            tenancy = self._project.tenancy(found)
        except Unready:
            return None
        return None if tenancy.inline is not None else tenancy.secret

    def _want(self, key: Key, found: T) -> None:
        secret = self._secret_of(found)
        if secret is not None:
            self._wanted.setdefault(secret, set()).add(key)
            self._follow_single(secret)

    def _unwant(self, key: Key, old: T, new: T | None) -> None:
        secret = self._secret_of(old)
        if secret is None or (new is not None and self._secret_of(new) == secret):
            return
        wanting = self._wanted[secret]
        wanting.discard(key)
        if not wanting:
            del self._wanted[secret]
            if (task := self._single.pop(secret, None)) is not None:
                task.cancel()
                self._secrets.pop("/".join(secret), None)
                self._broken.pop(("/".join(secret), "Secret"), None)

    def _follow_single(self, secret: Key) -> None:
        """A watch for one Secret that the project's selector does not choose."""
        if self._project.stands(secret) or secret in self._single or self._group is None:
            return
        namespace, name = secret
        if not (_NAME.fullmatch(namespace) and _NAME.fullmatch(name)):
            return  # there is none of such a name; `_credentials` says that it is missing
        single = replace(SECRETS, params={"fieldSelector": f"metadata.name={name}"}).within(namespace)
        source = self._access.input([single], timing=self._timing)
        self._single[secret] = self._group.create_task(source.run(partial(self._take, "/".join(secret))))

    def _find(self, secret: Key) -> Secret | None:
        places = (self._secrets.get(scope) for scope in ("/".join(secret), *self._scopes))
        return next((held.values[secret] for held in places if held is not None and secret in held.values), None)

    # --- tenants ------------------------------------------------------------------------------------------------------

    def _tell(self, found: T) -> None:
        """Say what there is to say of a tenant, if that is new."""
        if not self._complete:
            return
        uid, name = found.metadata.uid, name_of(found)
        credentials = None
        try:
            credentials = self._credentials(found)
            self._faults.pop(uid, None)
        except (Unready, KubeconfigError) as error:
            stays = "; the last good credentials stay in use" if self._said.get(uid) else ""
            self._faults[uid] = Problem(f"{self._project.title} {'/'.join(found.key)}", f"{error}{stays}")
        if uid in self._said and (credentials is None or credentials == self._said[uid]):
            return
        if uid not in self._said:
            for mark in self._marks(found):
                self._owners.set(mark, uid)
        self._said[uid] = credentials
        metadata = found.metadata
        strict = self._project.shares_nodes
        self._sink(TenantFound(uid, name, credentials, metadata.namespace, metadata.labels, strict, restricted=True))

    def _gone(self, old: T) -> None:
        uid = old.metadata.uid
        self._faults.pop(uid, None)
        if uid in self._said:
            del self._said[uid]
            for mark in self._marks(old):
                if self._owners.owner(mark) == uid:
                    self._owners.set(mark, None)
            self._sink(TenantGone(uid))

    def _marks(self, found: T) -> list[tuple[str, ...]]:
        return [(NAME, found.metadata.uid), (NAME, name_of(found)), *self._project.marks(found)]

    def _credentials(self, found: T) -> Credentials:
        """Raises Unready and KubeconfigError."""
        tenancy = self._project.tenancy(found)
        text = tenancy.inline
        if text is None:
            secret = self._find(tenancy.secret)
            where = f"Secret {printable('/'.join(tenancy.secret))}"
            if secret is None:
                raise Unready(f"{where} with its kubeconfig is not there (yet)")
            text = next((said for key in tenancy.keys if (said := secret.text(key))), "")
            if not text:
                raise Unready(f"{where} has no {' or '.join(tenancy.keys)}")
        return self._project.reach(found, load_kubeconfig(decode_kubeconfig(text)))


def name_of(found: HasKey) -> str:
    """What people call the tenant: NAMESPACE.NAME, which a device name or a label can hold too, and which is unique,
    since no namespace has a dot.
    """
    return ".".join(found.key)


def _broken(kind: str, error: ApiError) -> str:
    cure = "; grant list and watch, see deploy/README.md" if isinstance(error, Forbidden) else ""
    return f"{kind}s cannot be followed: {error}{cure}; its tenants stay as they are"


def _itself(found: V) -> V:
    return found


class _Resource(msgspec.Struct):
    name: str = ""


class _Served(msgspec.Struct):
    """An APIResourceList."""

    resources: tuple[_Resource, ...] = ()


class _Lost(Exception):
    """The objects' kind is not served any more, in that version at least."""
