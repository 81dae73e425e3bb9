"""A tenant's objects from its API server: three reflectors over one client whose credentials may change underneath.

Rotation is routine (certificates of a year, tokens of an hour), so it costs nothing: the next request uses the new
credentials, and watches that still run on the old connection are ended in good order, from where the reflectors resume
at the last resourceVersion. Nothing is listed again and the tenant is never stale for it. Where the old credentials
were refused already, nobody waits out the delays that this called for.

Another *server*, however, is another history: its resourceVersions mean nothing here. Then all is listed anew.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, NoReturn, TypeVar, cast

from vcproxy.brain.sources import Kind, ObjectSink
from vcproxy.brain.turns import Turn, Turns
from vcproxy.kube.client import Client
from vcproxy.kube.client import Limits as ClientLimits
from vcproxy.kube.decode import ENDPOINT_SLICES, SERVICE_CIDRS, SERVICES, HasKey, Page, Resource
from vcproxy.kube.errors import ApiError
from vcproxy.kube.kubeconfig import Credentials
from vcproxy.kube.lines import Line
from vcproxy.kube.reflector import Event, Reflector, Timing
from vcproxy.ops.stopping import heeded

T = TypeVar("T", bound=HasKey)
S = TypeVar("S")

TENANT_KINDS: tuple[Resource[Any], ...] = (SERVICES, ENDPOINT_SLICES, SERVICE_CIDRS)


class RotatingClient:
    """What a Reflector needs of a Client, with credentials that can be replaced while it is in use.

    `turn`: waited for before each list.
    """

    def __init__(self, make: Callable[[Credentials], Client], credentials: Credentials, turn: Turn) -> None:
        self._make = make
        self._turn = turn
        self._client = make(credentials)
        self.tenant = self._client.tenant
        self._waits: set[asyncio.Timeout] = set()

    @property
    def limits(self) -> ClientLimits:
        """What the server may make us hold; may be replaced at any time."""
        return self._client.limits

    @limits.setter
    def limits(self, limits: ClientLimits) -> None:
        self._client.limits = limits

    async def request(self, method: str, path: str, **how: Any) -> bytes:
        """As Client.request; one that is under way in a rotation fails. Raises ApiError."""
        return await self._client.request(method, path, **how)

    async def rotate(self, credentials: Credentials) -> None:
        """Use these from now on. Raises KubeconfigError, and then goes on with the old ones."""
        limits = self._client.limits
        old, self._client = self._client, self._make(credentials)
        self._client.limits = limits
        # aiohttp leaves whoever reads from a connection of a closed session waiting for ever: so they are told first.
        for wait in self._waits:
            wait.reschedule(0)
        self._waits.clear()
        await old.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    async def list_pages(self, resource: Resource[T], *, limit: int = 500) -> AsyncGenerator[Page[T], None]:
        """As Client.list_pages. A page under way in a rotation fails at its deadline, and the list begins anew."""
        async with self._turn as turn, aclosing(self._client.list_pages(resource, limit=limit)) as pages:
            async for page in pages:
                turn.renew()
                yield page

    async def list_and_watch(
        self, resource: Resource[T], *, timeout_seconds: int
    ) -> AsyncGenerator[list[Line] | Page[T], None]:
        """As Client.list_and_watch, with a turn until the list is there. A rotation before that is a new try, later an
        end in good order.
        """
        while True:
            client, step = self._client, None
            async with aclosing(client.list_and_watch(resource, timeout_seconds=timeout_seconds)) as steps:
                async with self._turn as turn:
                    while not isinstance(step, Page) and (step := await self._next(client, steps)) is not None:
                        turn.renew()
                        yield step
                if step is None:
                    continue
                del step  # the list: the watch may go on for minutes
                while (lines := await self._next(client, steps)) is not None:
                    yield lines
                return

    async def watch(
        self, resource: Resource[T], *, resource_version: str, timeout_seconds: int
    ) -> AsyncGenerator[list[Line], None]:
        """As Client.watch; a rotation is an end in good order, or before anything came, a new try."""
        started = False
        while True:
            client = self._client
            lines = client.watch(resource, resource_version=resource_version, timeout_seconds=timeout_seconds)
            async with aclosing(lines):
                while (batch := await self._next(client, lines)) is not None:
                    started = True
                    yield batch
            if started or client is self._client:
                return

    async def _next(self, client: Client, lines: AsyncGenerator[S, None]) -> S | None:
        """The next step, as a batch of lines; None at an end in good order, which a rotation is. Raises ApiError.

        A batch that arrives in the very moment of a rotation is dropped; it comes again where the watch resumes.
        """
        if client is not self._client:  # since the last batch, while nobody waited: nobody would ever be told
            return None
        try:
            async with asyncio.timeout(None) as wait:
                self._waits.add(wait)
                try:
                    return await anext(lines)
                finally:
                    self._waits.discard(wait)
        except StopAsyncIteration:
            return None
        except (ApiError, TimeoutError):
            if client is self._client:
                raise
            return None


class ApiInput:
    """Input from an API server.

    `resources`: what to follow. A ServiceCIDR that the server does not serve (before 1.33) is asked for ever more
    rarely, and concerns nobody else. `timing`: of each reflector. `connect`: makes the client for some credentials.
    `turns`: of all API servers that are listed a few at a time, None: this one waits for nobody. `stream`: as of a
    Reflector. `told`: gets each event too, with its collection's path and version, once the sink has taken it.
    """

    def __init__(
        self,
        credentials: Credentials,
        *,
        tenant: str,
        resources: Sequence[Resource[Any]],
        limits: ClientLimits,
        timing: Timing | None = None,
        connect: Callable[..., Client] = Client,
        turns: Turns | None = None,
        stream: bool = False,
        told: Callable[[str, Event[Any], str], None] = lambda path, event, version: None,
    ) -> None:
        self._stream = stream
        self._told = told
        self._credentials = credentials
        self._resources = resources
        self._timing = timing
        turn = Turn(turns or Turns())
        self._client = RotatingClient(partial(connect, tenant=tenant, limits=limits), credentials, turn)
        self._reflectors: tuple[Reflector[Any], ...] = ()
        self._moved = asyncio.Event()

    @property
    def server(self) -> str:
        """Where the API server is."""
        return self._credentials.server

    @property
    def versions(self) -> Mapping[str, str]:
        """Kind -> resourceVersion up to which everything was told, of kinds that have been listed."""
        return {found.resource.kind: found.resource_version for found in self._reflectors if found.resource_version}

    @property
    def places(self) -> Mapping[str, str]:
        """As `versions`, by the paths of collections: of one kind there may be several, in namespaces."""
        return {found.resource.path: found.resource_version for found in self._reflectors if found.resource_version}

    def relist(self) -> None:
        """List everything anew, whatever was told before."""
        self._moved.set()

    def limit(self, limits: ClientLimits) -> None:
        """These limits from now on."""
        self._client.limits = limits

    async def request(self, method: str, path: str, **how: Any) -> bytes:
        """One request of other kinds; see Client.request. Raises ApiError."""
        return await self._client.request(method, path, **how)

    async def rotate(self, credentials: Credentials) -> None:
        """Use these credentials from now on. Raises KubeconfigError, and then goes on with the old ones."""
        moved = credentials.server != self._credentials.server
        await self._client.rotate(credentials)
        self._credentials = credentials
        if moved:
            self._moved.set()
        for reflector in self._reflectors:
            reflector.retry()

    @property
    def heard(self) -> float | None:
        """Unix seconds: how new all is that is known of Services and EndpointSlices; None: not all has been read yet.

        An API server with nothing to report says so about once a minute.
        """
        followed = [found for found in self._reflectors if found.resource.kind != SERVICE_CIDRS.kind]
        times = [found.last_contact_wall for found in followed if found.last_contact_wall is not None]
        return min(times) if times and len(times) == len(followed) else None

    async def run(self, sink: ObjectSink) -> NoReturn:
        """List, watch, for ever."""
        try:
            while True:
                self._moved.clear()
                before = self._reflectors
                self._reflectors = tuple(self._reflector(resource, sink) for resource in self._resources)
                for new, old in zip(self._reflectors, before, strict=False):
                    new.broken = old.broken  # so that whoever was told of it is told of its end
                try:
                    await heeded(self._reflect())
                except* _Moved:
                    pass
        finally:
            await self._client.close()

    async def _reflect(self) -> None:
        async with asyncio.TaskGroup() as group:
            for reflector in self._reflectors:
                group.create_task(reflector.run())
            await self._moved.wait()
            raise _Moved

    def _reflector(self, resource: Resource[Any], sink: ObjectSink) -> Reflector[Any]:
        kind = cast("Kind", resource.kind)

        def take(event: Event[Any]) -> None:
            sink(kind, event)
            self._told(resource.path, event, reflector.resource_version)

        # RotatingClient has the methods that a Reflector calls, and is a Client in that.
        reflector = Reflector(cast("Client", self._client), resource, take, stream=self._stream, timing=self._timing)
        return reflector


class _Moved(Exception):
    """The API server is elsewhere now, or what it said is to be asked again."""
