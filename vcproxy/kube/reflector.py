"""The state of one collection of one API server, followed for as long as the tenant exists.

List once, watch from the list's resourceVersion, resume where a watch ended, list again when history is gone. A list
comes in pages, or (`stream`) as the beginning of the watch that follows it, where the API server has that (initial.py).
The rules that make this safe to build a data plane on:

- **Nothing but a complete list replaces.** `Listed` is delivered after the last page of a successful list, or when the
  server has marked the end of it in a stream. Every other outcome (refused credentials, 5xx, HTML, truncated JSON,
  silence, a stream that ends before that mark) is a `Broken` with its time, never data; the consumer keeps what it has.
- **A stream that is no list costs one attempt.** Where a server does not know such a list, all lists of this reflector
  are in pages from then on, the first of them at once. Where one was begun and came to nothing for another reason, or
  the answer was an error of the server's own, the next attempt, in its time, is in pages: these may get through.
- **A complete list is the truth**, also when its resourceVersion is lower than before: an etcd restored from a backup
  counts backwards. A watch that goes backwards gives that away too and is answered by a list; a watch from a version
  of the future would otherwise just be silent.
- **Only a short interruption is resumed.** An API server that was away for more than `resume_within` seconds has been
  restarted, when its watch cache has forgotten our version anyway (410), or replaced, perhaps with an empty etcd
  whose versions have meanwhile passed ours. A list is as cheap as finding out.
- **Silence is a failure.** With bookmarks an API server says something about once a minute. A watch that says nothing
  for `inactivity` seconds is dropped, and since nobody knows what it would have said, a list follows.
- **Trying again costs little.** Every attempt that ends early, in good order or not, waits a growing, jittered time;
  only `healthy_after` seconds of an accepted watch reset that. An API server that closes every watch at once sees a
  few requests a minute.
- **Time is shared.** One batch of lines, then other tasks run. A tenant that never stops writing gets its share of the
  processor and no more: beyond it nobody reads, and TCP makes its API server wait.

No object is kept here. The consumer holds the state anyway, and compares a `Listed` with it. An object of a wrong
shape is reported, and changes nothing: neither `Listed.errors` nor `Malformed` is a reason to drop the last good
version of it.

The layers, from the outside in: `run` is endless, `_session` is from one list to the next, `_watch` and
`_list_and_watch` are one connection each. (So in kopf.)
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic, NoReturn, TypeVar, cast

from vcproxy.kube.backoff import Backoff
from vcproxy.kube.budget import Budget
from vcproxy.kube.client import Client
from vcproxy.kube.decode import Added, Bad, HasKey, Key, Page, Removed, Resource, WatchEvent, decode_line
from vcproxy.kube.errors import (
    ApiError,
    BadResponse,
    Gone,
    ServerError,
    ShapeError,
    Throttled,
    Unreachable,
    Unserved,
)
from vcproxy.kube.lines import Line, Oversized
from vcproxy.kube.patience import patience

T = TypeVar("T", bound=HasKey)

RECEIVING = 6.3e-9
"""Seconds of processor time an octet that the kernel, TLS, HTTP and cutting lines have taken before a batch is here:
measured, since it is spent in the event loop's name. More than half of what an event costs."""

AT_ONCE = 4
"""Lines of a watch that are read before other tasks run: 0.2 ms, when they are EndpointSlices of ten endpoints.
A tenant that writes without end is read in many small pieces, not in a few large ones, for the others' sake."""


@dataclass(frozen=True, slots=True)
class Listed(Generic[T]):
    """The complete collection: what is not in `objects` is gone, save for what `errors` speaks of (ShapeError.key)."""

    objects: tuple[T, ...]
    errors: tuple[ShapeError, ...]


@dataclass(frozen=True, slots=True)
class Upserted(Generic[T]):
    """An object was added or has changed."""

    object: T


@dataclass(frozen=True, slots=True)
class Deleted:
    """An object is gone. `uid` is that of the one deleted, "" if the server did not say."""

    key: Key
    uid: str


@dataclass(frozen=True, slots=True)
class Malformed:
    """A change whose object has a wrong shape; what is held of it stays."""

    error: ShapeError


@dataclass(frozen=True, slots=True)
class Broken:
    """What is held may be out of date, since the time `since` (wall clock, seconds since the epoch), because of
    `error`.

    Delivered for every failed attempt with the same `since`, until `Recovered`.
    """

    error: ApiError
    since: float


@dataclass(frozen=True, slots=True)
class Recovered:
    """A watch was accepted: the collection is followed again. A `Listed` came before, unless nothing was missed."""


Event = Listed[T] | Upserted[T] | Deleted | Malformed | Broken | Recovered
Sink = Callable[[Event[T]], None]
"""Takes one event, at once: it must neither block nor raise. An exception ends the reflector, as the bug that it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Times in seconds.

    watch_seconds: how long the server should let a watch live, drawn anew each time so that a thousand do not end
    together. share: of one processor's time, how much receiving and reading events may take on average; saved: how many
    seconds of it may be taken at once after a quiet time.
    """

    inactivity: float = 150.0
    resume_within: float = 2.0
    watch_seconds: tuple[int, int] = (300, 600)
    backoff_base: float = 0.5
    backoff_cap: float = 60.0
    healthy_after: float = 30.0
    share: float = 0.03
    saved: float = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a test replaces: clocks, sleep and chance."""

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    spent: Callable[[], float] = time.thread_time
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    uniform: Callable[[float, float], float] = random.uniform


class Reflector(Generic[T]):
    """Follows one `resource` through one `client` and tells `sink` about it; `await run()` within a TaskGroup.

    `page`: objects in a page of a list. `stream`: ask for lists as streams first.
    To read at any time: `synced` (a list has been delivered), `broken` (the current Broken or None), `last_contact`
    (monotonic seconds of the last complete list, event, bookmark or orderly end; None before the first),
    `last_contact_wall` (the same as seconds since the epoch), `lists` (how many lists were delivered) and
    `resource_version`.
    """

    def __init__(
        self,
        client: Client,
        resource: Resource[T],
        sink: Sink[T],
        *,
        page: int = 500,
        stream: bool = False,
        timing: Timing | None = None,
        surroundings: Surroundings | None = None,
    ) -> None:
        self.resource = resource
        self.synced = False
        self.broken: Broken | None = None
        self.last_contact: float | None = None
        self.last_contact_wall: float | None = None
        self.lists = 0
        self.resource_version = ""
        self._client = client
        self._sink = sink
        self._page = page
        self._stream = stream
        self._streaming = stream  # at the next attempt
        self._listing = False  # a list is under way
        self._pause: asyncio.Timeout | None = None  # around the wait for the next attempt
        self._accepted: float | None = None  # when the server accepted the watch that goes on
        self._broken_at = 0.0  # monotonic beginning of `broken`
        self._timing = timing or Timing()
        self._around = surroundings or Surroundings()
        self._backoff = Backoff(
            base=self._timing.backoff_base, cap=self._timing.backoff_cap, uniform=self._around.uniform
        )

    async def run(self) -> NoReturn:
        """Endless: one session after the other, since a tenant whose API server is away is still a tenant."""
        while True:
            await self._session()

    def retry(self) -> None:
        """Why the last attempt failed may be gone (new credentials): if the next one is being waited for, make it now.

        What the server asked for (Retry-After) was said to whom we were before. The delays after it go on as they grew.
        """
        if self._pause is not None:
            self._pause.reschedule(0)

    async def _session(self) -> None:
        """From one list to the need for the next: while history allows, watches resume and nothing is listed again."""
        if not await self._attempt(self._list_and_watch if self._streaming else self._list):
            return
        while await self._attempt(self._watch):
            pass

    async def _attempt(self, step: Callable[[], Awaitable[bool]]) -> bool:
        """One list or one watch or both, and the wait that its end calls for. False: list next, true: watch next.

        Failures end here, so that nothing below needs to care whose turn is next.
        """
        wish = None
        self._listing = step != self._watch
        self._accepted = None
        try:
            watchable = await step()
        except Gone as error:
            # Not a failure: it is how an API server asks for a list. In the middle of a list it is one.
            watchable, wish = False, error.retry_after
            if self._listing:
                self._break(error)
        except ApiError as error:
            # A lost connection or a full queue leaves history as it was; any other answer to a watch puts it in doubt.
            resumable = isinstance(error, Unreachable | Throttled) and not isinstance(error, _Silence)
            watchable, wish = resumable and not self._listing, error.retry_after
            self._break(error)
        else:
            if self._accepted is None:  # a list and no watch yet
                return watchable
        if self._accepted is not None and self._around.monotonic() - self._accepted >= self._timing.healthy_after:
            self._backoff.reset()
            if self.broken is None:
                return watchable
        await self._wait(self._backoff.next(at_least=wish))
        return watchable and not self._away_too_long()

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None) as self._pause:
                await self._around.sleep(seconds)
        self._pause = None

    def _away_too_long(self) -> bool:
        """Whether the API server was out of reach for so long that it may have been replaced; asked after the wait."""
        if self.broken is None or not isinstance(self.broken.error, Unreachable):
            return False
        return self._around.monotonic() - self._broken_at > self._timing.resume_within

    async def _list(self) -> bool:
        """One complete list, delivered in one piece or not at all."""
        objects: list[T] = []
        errors: list[ShapeError] = []
        version = ""
        try:
            async with aclosing(self._client.list_pages(self.resource, limit=self._page)) as pages:
                async for page in pages:
                    objects.extend(page.objects)
                    errors.extend(page.errors)
                    version = page.resource_version
                    await asyncio.sleep(0)
        except Gone:  # that paging was too slow
            self._page = 0
            raise
        self._deliver(Listed(tuple(objects), tuple(errors)), version)
        return True

    async def _list_and_watch(self) -> bool:
        """One complete list and the watch that it goes on as; as `_list` where the server knows no such thing."""
        steps = self._client.list_and_watch(self.resource, timeout_seconds=self._draw_seconds())
        async with aclosing(steps):
            try:
                await self._listed(steps)
            except Unserved:
                self._stream = self._streaming = False
            except (Gone, ServerError, BadResponse):
                self._streaming = False  # it may be the question
                raise
            else:
                return await self._follow(cast("AsyncGenerator[list[Line], None]", steps))
        return await self._list()

    async def _listed(self, steps: AsyncGenerator[list[Line] | Page[T], None]) -> None:
        await anext(steps)
        self._streaming = False  # should this one fail, now that it was accepted
        async for step in steps:
            if isinstance(step, Page):
                self._deliver(Listed(step.objects, step.errors), step.resource_version)
                return
            await asyncio.sleep(0)

    def _deliver(self, listed: Listed[T], version: str) -> None:
        self.resource_version = version
        self.synced = True
        self.lists += 1
        self._listing, self._streaming = False, self._stream
        self._sink(listed)
        self._contact()

    async def _watch(self) -> bool:
        """One watch from where the last one ended; true when it ended in good order, so that the next may resume."""
        lines = self._client.watch(
            self.resource, resource_version=self.resource_version, timeout_seconds=self._draw_seconds()
        )
        async with aclosing(lines):
            await anext(lines)
            return await self._follow(lines)

    async def _follow(self, lines: AsyncGenerator[list[Line], None]) -> bool:
        """What an accepted watch says, to its end. Raises _Silence when it says nothing for `inactivity` seconds."""
        around, timing = self._around, self._timing
        self._accepted = around.monotonic()
        budget = Budget(timing.share, timing.saved, self._accepted)
        self._mend()  # here and not after a list: who may list but not watch is not being followed
        try:
            async with patience(timing.inactivity) as patient:
                async for batch in lines:
                    for first in range(0, len(batch), AT_ONCE):
                        began, octets = around.spent(), 0
                        for line in batch[first : first + AT_ONCE]:
                            self._take(line)
                            octets += line.size if isinstance(line, Oversized) else len(line)
                        self._contact()
                        wait = budget.spend(around.spent() - began + octets * RECEIVING, around.monotonic())
                        patient.heard(wait)
                        await (around.sleep(wait) if wait else asyncio.sleep(0))
        except TimeoutError:
            raise _Silence(
                tenant=self._client.tenant,
                path=self.resource.path,
                message=f"the watch said nothing for {timing.inactivity:g} s",
            ) from None
        self._contact()
        return True

    def _draw_seconds(self) -> int:
        return round(self._around.uniform(*self._timing.watch_seconds))

    def _take(self, line: Line) -> None:
        """One line: moves on to its resourceVersion, and tells the consumer, as of a list. Raises ApiError."""
        tenant, limit = self._client.tenant, self._client.limits.object_bytes
        event: WatchEvent[T] = decode_line(self.resource, line, tenant=tenant, object_bytes=limit)
        version = event.resource_version
        if _backwards(self.resource_version, version):
            raise Gone(
                tenant=tenant,
                path=self.resource.path,
                message=f"history was rewritten: {version} came after {self.resource_version}",
            )
        if version:
            self.resource_version = version
        match event:
            case Added():
                self._sink(Upserted(event.object))
            case Removed():
                self._sink(Deleted(event.key, event.uid))
            case Bad():
                self._sink(Malformed(event.error))

    def _contact(self) -> None:
        self.last_contact, self.last_contact_wall = self._around.monotonic(), self._around.wall()

    def _break(self, error: ApiError) -> None:
        if self.broken is None:
            self._broken_at = self._around.monotonic()
        self.broken = Broken(error, self.broken.since if self.broken else self._around.wall())
        self._sink(self.broken)

    def _mend(self) -> None:
        if self.broken is not None:
            self.broken = None
            self._sink(Recovered())


class _Silence(Unreachable):
    """A watch that stopped talking: unlike with a lost connection, nobody knows what was missed."""


def _backwards(old: str, new: str) -> bool:
    """Whether a resourceVersion is older than one before it; only those that are numbers can be compared (KEP-5504)."""
    return all(v.isascii() and v.isdigit() and len(v) <= 20 for v in (old, new)) and int(new) < int(old)
