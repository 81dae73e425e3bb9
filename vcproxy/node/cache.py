"""The last good state on disk: a node that starts with the brain down programs what it had.

Writing is never on the way of a change to the kernel (see ops.statedir). Nothing here is ever fatal: a file that cannot
be used is left where it is, with a log line, and overwritten by the next good one.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from vcproxy.model.node import NodeFacts
from vcproxy.model.services import PortKey
from vcproxy.model.tenant import Operation, PutPort, RemovePort, TenantModel
from vcproxy.node import statefile
from vcproxy.node.holdings import Held, Holdings
from vcproxy.node.statefile import NodeImage, TenantHeader
from vcproxy.ops import logs, statedir
from vcproxy.ops.journal import Journal
from vcproxy.ops.sealed import UID, UnusableState
from vcproxy.ops.statedir import Job, StateDirectory, replace

DELAY = 1.0
RETRY = 60.0

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
        self._image = NodeImage()
        self._journal = Journal(statefile.MAGIC)
        self._changed: dict[str, set[PortKey] | None] = {}  # since the tenant was written; None: everything
        self._files = StateDirectory(directory, self._job, delay=delay, retry=retry)

    # The agent's side: notes, no work.

    def changed(self, uid: str, touched: Iterable[PortKey] | None) -> None:
        """What is held of the tenant differs in these service ports; None: perhaps in all."""
        known = self._changed.setdefault(uid, set())
        if touched is None:
            self._changed[uid] = None
        elif known is not None:
            known.update(touched)

    def keep(self, uid: str) -> None:
        """The tenant's committed state changed: write it, soon."""
        self._files.note(uid + SUFFIX)

    def forget(self, uid: str) -> None:
        """The tenant is gone: delete it."""
        self._files.note(uid + SUFFIX, gone=True)

    def keep_node(self, facts: NodeFacts | None, placement: Mapping[bytes, str] | None) -> None:
        """What the brain told of this node changed."""
        self._image = NodeImage(facts, placement, self._holdings.mark)
        self._files.note(NODE_FILE)

    # Writing.

    async def run(self) -> None:
        """Write what is out of date, for ever."""
        await self._files.run()

    async def flush(self) -> None:
        """Write all that is out of date now; at the end of the process."""
        await self._files.flush()

    def _job(self, name: str) -> Job | None:
        """What makes the file true, bound to data as it is now; None if it need not be."""
        path = self._directory / name
        if name == NODE_FILE:
            image = self._image
            return lambda: replace(path, statefile.encode_node(image, node=self._node))
        uid = name.removesuffix(SUFFIX)
        held = self._holdings.get(uid)
        if not UID.fullmatch(uid):
            log.error("a tenant's uid cannot be the name of a file; it is not remembered", tenant=uid)
            return None
        if held is None:
            self._changed.pop(uid, None)
            return lambda: self._journal.delete(path)
        if not held.synced:
            return None
        header = TenantHeader(self._node, held.tenant, held.revision, held.brain, held.model.digest, dict(held.mark))
        if self._journal.header(path) == header and path.exists():
            return None
        touched = self._changed.pop(uid, set())
        if touched is not None and self._journal.takes_changes(path):
            operations = [_now(key, held.model) for key in touched]
            return lambda: self._journal.change(path, header, operations)
        ports = tuple(held.model)
        return lambda: self._journal.write(path, header, ports)

    # Reading.

    @property
    def remembers(self) -> bool:
        """True if there is something of some tenant."""
        return any(self._directory.glob("*" + SUFFIX))

    def load(self) -> Remembered:
        """All that is on disk and usable. Blocks; never raises."""
        try:
            paths = statedir.listing(self._directory)
        except OSError as error:
            log.error("the last good state cannot be read", path=str(self._directory), error=str(error))
            return Remembered([], None, None)
        tenants = []
        for path in paths:
            if path.suffix == SUFFIX and UID.fullmatch(path.stem):
                held = _usable(path, functools.partial(self._held, path))
                if held is not None:
                    tenants.append(held)
        node = self._directory / NODE_FILE
        if node.exists():
            self._image = _usable(node, lambda data: statefile.decode_node(data, node=self._node)) or NodeImage()
            self._holdings.mark = self._image.mark
        return Remembered(tenants, self._image.facts, self._image.placement)

    def _held(self, path: Path, data: bytes) -> Held:
        header, model, end = statefile.decode_tenant(data, node=self._node, uid=path.stem)
        self._journal.read(path, end, header)
        return Held(header.tenant, model, header.revision, header.brain, synced=True, mark=header.mark)


def _now(key: PortKey, model: TenantModel) -> Operation:
    port = model.get(key)
    return PutPort(port) if port is not None else RemovePort(key)


def _usable(path: Path, decode: Callable[[bytes], T]) -> T | None:
    try:
        return decode(path.read_bytes())
    except (OSError, UnusableState) as error:
        log.warning("a file of the last good state is ignored", path=str(path), error=str(error))
        return None
