"""The last good state on disk: a node that starts with the brain down programs what it had.

Writing is never on the way of a change to the kernel: a commit only notes that a tenant's file is out of date. The one
writer comes round a second later, copies the tenant's ports (tuples of immutable objects: microseconds) and writes in
a thread; a tenant that changes all the time is written seldom enough for writing to take at most a twentieth of the
time. A file is replaced by rename, after fsync, so it is whole or the one before.

Nothing here is ever fatal. A file that cannot be used is left where it is, with a log line, and overwritten by the
next good one; a disk that cannot be written costs a log line, a count, and another try a minute later.
"""

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from vcproxy.model.node import NodeFacts
from vcproxy.node import statefile
from vcproxy.node.holdings import Held, Holdings
from vcproxy.node.statefile import UID, NodeImage, TenantImage, UnusableState
from vcproxy.ops import logs, metrics

DELAY = 1.0
RETRY = 60.0
# A file that took t seconds to write is written again t * SPARING later at the earliest.
SPARING = 20.0

SUFFIX = ".tenant"
NODE_FILE = "node"

T = TypeVar("T")

log = logs.get("cache")


class Remembered(NamedTuple):
    """What was on disk: tenants as they were committed, and what the brain told of the node (None: unknown)."""

    tenants: list[Held]
    facts: NodeFacts | None
    placement: Mapping[bytes, str] | None


class Cache:
    """The state of node `node` in `directory`. `load` first, in any thread; all else belongs to the loop."""

    def __init__(
        self, directory: Path, *, node: str, holdings: Holdings, delay: float = DELAY, retry: float = RETRY
    ) -> None:
        self._directory = directory
        self._node = node
        self._holdings = holdings
        self._delay = delay
        self._retry = retry
        self._image = NodeImage()
        self._due: dict[str, float] = {}
        self._cost: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()

    # The agent's side: notes, no work.

    def keep(self, uid: str) -> None:
        """The tenant's committed state changed: write it, soon."""
        self._note(uid + SUFFIX)

    def forget(self, uid: str) -> None:
        """The tenant is gone: delete it."""
        self._cost.pop(uid + SUFFIX, None)
        self._note(uid + SUFFIX)

    def keep_node(self, facts: NodeFacts | None, placement: Mapping[bytes, str] | None) -> None:
        """What the brain told of this node changed."""
        self._image = NodeImage(facts, placement)
        self._note(NODE_FILE)

    def _note(self, name: str) -> None:
        wait = max(self._delay, SPARING * self._cost.get(name, 0.0))
        self._due.setdefault(name, time.monotonic() + wait)
        self._wake.set()

    # Writing.

    async def run(self) -> None:
        """Write what is out of date, for ever."""
        while True:
            self._wake.clear()
            wait = min(self._due.values()) - time.monotonic() if self._due else None
            if wait is not None and wait <= 0:
                await self._write([name for name, at in self._due.items() if at <= time.monotonic()])
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()

    async def flush(self) -> None:
        """Write all that is out of date now; at the end of the process."""
        await self._write(list(self._due))

    async def _write(self, names: list[str]) -> None:
        async with self._writing:
            for name in names:
                if self._due.pop(name, None) is None:
                    continue
                job = self._job(name)
                if job is None:
                    continue
                started = time.monotonic()
                try:
                    await asyncio.to_thread(job)
                except OSError as error:
                    metrics.CACHE_FAILURES.inc()
                    self._due.setdefault(name, time.monotonic() + self._retry)
                    log.error(
                        "the last good state cannot be written; the agent goes on without",
                        path=str(self._directory / name),
                        error=str(error),
                        retry_in=self._retry,
                    )
                else:
                    self._cost[name] = time.monotonic() - started

    def _job(self, name: str) -> Callable[[], None] | None:
        """What makes the file true, bound to data as it is now; None if it need not be."""
        path = self._directory / name
        if name == NODE_FILE:
            image = self._image
            return lambda: _replace(path, statefile.encode_node(image, node=self._node))
        uid = name.removesuffix(SUFFIX)
        held = self._holdings.get(uid)
        if not UID.fullmatch(uid):
            log.error("a tenant's uid cannot be the name of a file; it is not remembered", tenant=uid)
            return None
        if held is None:
            return lambda: path.unlink(missing_ok=True)
        if not held.synced:
            return None
        tenant = TenantImage(held.tenant, tuple(held.model), held.revision, held.brain, held.model.digest, held.mark)
        return lambda: _replace(path, statefile.encode_tenant(tenant, node=self._node))

    # Reading.

    def load(self) -> Remembered:
        """All that is on disk and usable. Blocks; never raises."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            paths = sorted(self._directory.iterdir())
        except OSError as error:
            log.error("the last good state cannot be read", path=str(self._directory), error=str(error))
            return Remembered([], None, None)
        tenants = []
        for path in paths:
            if path.suffix == ".tmp":
                with contextlib.suppress(OSError):
                    path.unlink()  # A run ended while it wrote.
            elif path.suffix == SUFFIX and UID.fullmatch(path.stem):
                held = _usable(path, functools.partial(self._held, uid=path.stem))
                if held is not None:
                    tenants.append(held)
        node = self._directory / NODE_FILE
        if node.exists():
            self._image = _usable(node, lambda data: statefile.decode_node(data, node=self._node)) or NodeImage()
        return Remembered(tenants, self._image.facts, self._image.placement)

    def _held(self, data: bytes, *, uid: str) -> Held:
        tenant, model, revision, brain, mark = statefile.decode_tenant(data, node=self._node, uid=uid)
        return Held(tenant, model, revision, brain, synced=True, mark=mark)


def _usable(path: Path, decode: Callable[[bytes], T]) -> T | None:
    try:
        return decode(path.read_bytes())
    except (OSError, UnusableState) as error:
        log.warning("a file of the last good state is ignored", path=str(path), error=str(error))
        return None


def _replace(path: Path, pieces: Iterable[bytes]) -> None:
    """Make `path` hold the pieces, or stay as it is. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
