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
one. Writing is lazy and sparing (ops.statedir), and a file is not written again for a content that it has.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path

import msgspec

from vcproxy.brain.guard import Policy
from vcproxy.brain.restriction import restrict
from vcproxy.brain.screen import Rights
from vcproxy.brain.store import Remembered, Store
from vcproxy.model.addresses import NEVER
from vcproxy.model.mark import Position, plausible
from vcproxy.model.tenant import Tenant, TenantModel
from vcproxy.ops import logs, statedir
from vcproxy.ops.sealed import UID, UnusableState, seal, unseal
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
        self._written: dict[str, tuple[bytes, Tenant]] = {}
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
        if one is None:
            return False
        self._store.remember((one,))
        self._written[uid] = (one.model.digest, one.tenant)
        return True

    def changed(self, uid: str) -> None:
        """The store's subscriber."""
        stored = self._store.tenants().get(uid)
        if stored is None:
            self._written.pop(uid, None)
            if self._store.gone(uid):
                self._files.note(uid + SUFFIX, gone=True)
        elif stored.synced and self._written.get(uid) != (stored.model.digest, stored.tenant):
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
                self._written.pop(uid, None)
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
            return partial(path.unlink, missing_ok=True) if gone else None
        content = (stored.model.digest, stored.tenant)
        if not stored.synced or stored.restored or self._written.get(uid) == content:
            return None
        policy = self._policy_of(uid)
        if policy is None:
            return None
        read_at = stored.stale_since or time.time()
        header = _Header(_fingerprint(policy), stored.tenant, stored.model.digest, dict(stored.mark), read_at)
        ports = tuple(stored.model)

        def write() -> None:
            self._written.pop(uid, None)
            statedir.replace(path, seal(MAGIC, header, ports))
            self._written[uid] = content

        return write

    def _read(self, path: Path) -> Remembered | None:
        try:
            data = path.read_bytes()
        except OSError as error:
            _log.error("a file of the last good state cannot be read", path=str(path), error=str(error))
            return None
        try:
            return self._decode(data, uid=path.stem)
        except UnusableState as error:
            aside = path.with_name(path.name + UNUSABLE)
            _log.error(
                "a file of the last good state is not used", path=str(path), error=str(error), set_aside=str(aside)
            )
            with contextlib.suppress(OSError):
                path.rename(aside)
        return None

    def _decode(self, data: bytes, *, uid: str) -> Remembered:
        first, ports = unseal(MAGIC, data)
        try:
            header = _header.decode(first)
            if header.tenant.uid != uid or not UID.fullmatch(uid):
                raise UnusableState(f"it is of tenant {header.tenant.uid[:64]!r}")
            model = TenantModel(ports)
        except msgspec.MsgspecError as error:
            raise UnusableState(f"it does not decode: {error}") from error
        if model.digest != header.digest:
            raise UnusableState("its content does not have the digest it claims: another version wrote it")
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
