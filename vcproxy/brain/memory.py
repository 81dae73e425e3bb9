"""The last good content of every tenant on disk: a brain that starts while a tenant's API server is down serves it.

Nodes have their own last good state and need this only for what they do not hold: a tenant whose first pod comes to a
node, a node that is new, one that reboots with an empty disk. Without it a restarted brain has nothing to say of that
tenant until its API server is back.

Compiled content is kept, not the objects that it came from: some 220 octets for a Service with ten endpoints, and no
compiler at the start. So what the guard would refuse today must not come back with it: the file says under which policy
it was compiled, and under another one it is not used; of its endpoints only those are that the super cluster still says
are the tenant's. Both are looked at when it is to be served: a brain that starts does not know the rules yet. Its mark
comes along: such content is older than what a node may hold, and is then not sent (see stream). Nor is it ever served
before the API server was tried: what can be read is read.

Nothing here is fatal. A file that cannot be used is named, set aside as NAME.unusable, and replaced by the next good
one. Writing is lazy and sparing (ops.statedir), and costs what changed: what nodes were sent since, if that is still
known, and only else all of the content (ops.journal).
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path

import msgspec

from vcproxy.brain.encoding import decode_operations
from vcproxy.brain.guard import Policy
from vcproxy.brain.restriction import restrict
from vcproxy.brain.screen import Rights
from vcproxy.brain.store import Remembered, Store, Stored
from vcproxy.model.addresses import NEVER
from vcproxy.model.mark import Position, plausible
from vcproxy.model.tenant import Tenant, TenantModel
from vcproxy.ops import logs, statedir
from vcproxy.ops.journal import Journal
from vcproxy.ops.sealed import UID, UnusableState, unseal
from vcproxy.ops.statedir import Job, StateDirectory

MAGIC = b"vcproxy-brain-state\n"
SUFFIX = ".tenant"
UNUSABLE = ".unusable"
DELAY = 10.0
REST = 9.0
"""Writing takes a tenth of one thread's time at most, however many tenants change."""

_log = logs.get("memory")


class _Header(msgspec.Struct, frozen=True):
    policy: bytes
    tenant: Tenant
    digest: bytes
    mark: dict[str, Position]
    read_at: float


_header = msgspec.msgpack.Decoder(_Header)


class Memory:
    """The files of `store` in `directory`. `load` first, in any thread; all else belongs to the loop.

    `policy_of`: the policy of the tenant with a uid, None while it is not known; `rights_of`: its right to endpoint
    addresses, None: to any.
    """

    def __init__(
        self,
        directory: Path,
        store: Store,
        *,
        policy_of: Callable[[str], Policy | None],
        rights_of: Callable[[str, Policy], Rights | None] = lambda uid, policy: None,
        delay: float = DELAY,
    ) -> None:
        self._directory = directory
        self._store = store
        self._policy_of = policy_of
        self._rights_of = rights_of
        self._files = StateDirectory(directory, self._job, delay=delay, rest=REST)
        self._journal = Journal(MAGIC)
        self._told: set[str] = set()  # whose rules have changed since
        self._nobodys: set[str] = set()

    def load(self) -> int:
        """Hand the store all that is usable; returns how many tenants. Blocks; never raises."""
        return len([uid for uid in self._uids() if self.recall(uid)])

    def recall(self, uid: str) -> bool:
        """Hand the store what there is of one tenant, as `load` does; call before it is added. Blocks; never raises."""
        path = self._directory / (uid + SUFFIX)
        if not UID.fullmatch(uid) or not path.exists():
            return False
        one = self._read(path)
        if one is not None:
            self._store.remember((one,))
        return one is not None

    def changed(self, uid: str) -> None:
        """The store's subscriber."""
        stored = self._store.tenants().get(uid)
        if stored is None:
            if self._store.gone(uid):
                self._files.note(uid + SUFFIX, gone=True)
        elif stored.synced and not self._has(self._directory / (uid + SUFFIX), stored):
            self._files.note(uid + SUFFIX)

    async def run(self) -> None:
        """Write what is out of date, for ever."""
        await self._files.run()

    async def flush(self) -> None:
        """Write all that is out of date now; at the end of the process."""
        await self._files.flush()

    def prune(self, known: Container[str]) -> None:
        """These are all tenants there are: forget the others, and delete their files. A look at the directory."""
        self._store.forget_remembered()
        for uid in self._uids():
            if uid not in known:
                self._nobodys.add(uid)
                self._files.note(uid + SUFFIX, gone=True)

    def _uids(self) -> list[str]:
        """Of which tenants there are files."""
        try:
            return [path.stem for path in statedir.listing(self._directory) if path.suffix == SUFFIX]
        except OSError as error:
            _log.error("the last good state cannot be read", path=str(self._directory), error=str(error))
            return []

    def _job(self, name: str) -> Job | None:
        path, uid = self._directory / name, name.removesuffix(SUFFIX)
        if not UID.fullmatch(uid):
            _log.error("a tenant's uid cannot be the name of a file; it is not remembered", tenant=uid)
            return None
        stored = self._store.tenants().get(uid)
        if stored is None:  # gone, or another brain's now
            gone = self._store.gone(uid) or uid in self._nobodys
            return partial(self._journal.delete, path) if gone else None
        if not stored.synced or stored.restored or self._has(path, stored):
            return None
        policy = self._policy_of(uid)
        if policy is None:
            return None
        read_at = stored.stale_since or time.time()
        header = _Header(_fingerprint(policy), stored.tenant, stored.model.digest, dict(stored.mark), read_at)
        if self._journal.takes_changes(path):
            before = self._journal.header(path)
            steps = stored.history.since(before.digest) if isinstance(before, _Header) else None
            if steps is not None:
                return lambda: self._journal.change(path, header, decode_operations(uid, steps))
        ports = tuple(stored.model)
        return lambda: self._journal.write(path, header, ports)

    def _has(self, path: Path, stored: Stored) -> bool:
        """True if the file says that already."""
        match self._journal.header(path):
            case _Header(tenant=tenant, digest=digest):
                return (tenant, digest) == (stored.tenant, stored.model.digest)
        return False

    def _read(self, path: Path) -> Remembered | None:
        try:
            data = path.read_bytes()
        except OSError as error:
            _log.error("a file of the last good state cannot be read", path=str(path), error=str(error))
            return None
        try:
            return self._decode(path, data)
        except UnusableState as error:
            aside = path.with_name(path.name + UNUSABLE)
            _log.error(
                "a file of the last good state is not used", path=str(path), error=str(error), set_aside=str(aside)
            )
            with contextlib.suppress(OSError):
                path.rename(aside)
        return None

    def _decode(self, path: Path, data: bytes) -> Remembered:
        header, model, end = unseal(MAGIC, data, _header.decode)
        uid = path.stem
        if header.tenant.uid != uid or not UID.fullmatch(uid):
            raise UnusableState(f"it is of tenant {header.tenant.uid[:64]!r}")
        if model.digest != header.digest:
            raise UnusableState("its content does not have the digest it claims: another version wrote it")
        self._journal.read(path, end, header)
        mark = plausible(header.mark, time.time())
        return Remembered(header.tenant, model, mark, header.read_at, partial(self._admit, uid, header.policy))

    def _admit(self, uid: str, compiled_by: bytes, model: TenantModel) -> TenantModel | None:
        policy = self._policy_of(uid)
        if policy is None:
            return None
        if _fingerprint(policy) != compiled_by:
            if uid not in self._told:  # asked again at each try to reach the API server
                self._told.add(uid)
                _log.warning("a last good state is not used: the tenant's policy has changed since", tenant=uid)
            return None
        change = restrict(model, policy, policy, self._rights_of(uid, policy))
        for key in change.removed:
            model.remove(key)
        for port in change.put:
            model.put(port)
        return model


def _fingerprint(policy: Policy) -> bytes:
    rules = repr((policy, NEVER))
    return hashlib.blake2b(rules.encode(), digest_size=16).digest()
