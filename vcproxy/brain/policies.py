"""TenantPolicies: grants that the super cluster's administrators keep there, as objects of a kind of its own.

The kind is optional. A super cluster without the CustomResourceDefinition has no policies, and neither has one that
refuses to show them (which is a problem, and shown); but one that cannot be reached may have any, so until it answered
once nothing is known and no tenant is compiled: a grant that is forgotten over a restart would cut off who has it.

A spec is checked here as strictly as the configuration file, whatever the API server has let through. One that cannot
be used keeps its last good form. What is wrong, and how many tenants a policy matches, is written into its status, if
that differs from what it says already: brains that agree write once.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote

import msgspec

from vcproxy.brain.config import Override
from vcproxy.kube import shapes
from vcproxy.kube.client import MERGE_PATCH
from vcproxy.kube.decode import UNDECODABLE, Resource
from vcproxy.kube.errors import ApiError, Forbidden, NotFound, printable
from vcproxy.kube.reflector import Broken, Deleted, Event, Listed, Malformed, Recovered, Upserted
from vcproxy.ops import configfile, logs

PATH = "/apis/vcproxy.dev/v1alpha1/tenantpolicies"
STATUS_SECONDS = 1.0
"""How long statuses wait for more to change before they are written."""

_log = logs.get("policies")


class PolicyMetadata(shapes.Metadata, frozen=True):
    """metadata of a TenantPolicy; `generation` counts changes of its spec."""

    generation: int = 0


class PolicyStatus(shapes.Shape, frozen=True):
    """status of a TenantPolicy, written by the brain."""

    observed_generation: int = 0
    matched_tenants: int = 0
    problems: tuple[str, ...] = ()


class PolicyObject(shapes.Shape, frozen=True):
    """vcproxy.dev/v1alpha1 TenantPolicy; cluster-scoped. `spec` is an Override."""

    metadata: PolicyMetadata
    spec: msgspec.Raw = msgspec.Raw(b"{}")
    status: PolicyStatus = PolicyStatus()

    @property
    def key(self) -> tuple[str, str]:
        """("", name)."""
        return "", self.metadata.name


TENANT_POLICIES = Resource("TenantPolicy", PATH, PolicyObject)


class _Held(NamedTuple):
    """A policy as last read: its last good form (None: there never was one), and why that is not the newest."""

    override: Override | None
    problem: str
    generation: int
    status: PolicyStatus


class Policies:
    """Follows TenantPolicies; `changed` is called when what they grant did, or became known.

    `judge`: says of an Override's policy why it cannot be kept, "" if it can. `matched`: how many tenants an Override
    matches. `patch`: one request to the super cluster, as Client.request.
    """

    def __init__(
        self,
        *,
        judge: Callable[[Any], str],
        matched: Callable[[Override], int],
        patch: Callable[..., Awaitable[bytes]],
        changed: Callable[[], None],
        pause: float = STATUS_SECONDS,
    ) -> None:
        self.known = False
        self._judge = judge
        self._matched = matched
        self._patch = patch
        self._changed = changed
        self._pause = pause
        self._held: dict[str, _Held] = {}
        self._broken = ""
        self._unwritten = asyncio.Event()

    @property
    def overrides(self) -> Mapping[str, Override]:
        """Those in force, by name."""
        return {name: held.override for name, held in self._held.items() if held.override is not None}

    def problems(self) -> list[tuple[str, str]]:
        """(subject, message) each."""
        found = [(f"TenantPolicy {name}", held.problem) for name, held in sorted(self._held.items()) if held.problem]
        return [*found, *([("TenantPolicies", self._broken)] if self._broken else ())]

    def take(self, event: Event[PolicyObject]) -> None:
        """One event."""
        before, known = self.overrides, self.known
        match event:
            case Listed(objects, errors):
                kept = {error.key for error in errors}
                if None not in kept:
                    names = {key[1] for key in kept if key} | {found.metadata.name for found in objects}
                    self._held = {name: held for name, held in self._held.items() if name in names}
                for found in objects:
                    self._put(found)
                self.known = True
            case Upserted(found):
                self._put(found)
            case Deleted(key):
                self._held.pop(key[1], None)
            case Malformed(error):
                if error.key is not None:
                    held = self._held.get(error.key[1], _Held(None, "", 0, PolicyStatus()))
                    self._held[error.key[1]] = held._replace(problem=f"{error.field}: {error.reason}")
            case Broken(error):
                absent = isinstance(error, NotFound)
                self._broken = "" if absent else f"{error}; {_CURE}"
                if absent:
                    self._held = {}
                self.known = self.known or absent or isinstance(error, Forbidden)
            case Recovered():
                self._broken = ""
        self.touch()
        if self.overrides != before or self.known != known:
            self._changed()

    def touch(self) -> None:
        """Statuses may have changed: a policy, or which tenants there are."""
        self._unwritten.set()

    async def run(self) -> NoReturn:
        """Write statuses, for ever."""
        while True:
            await self._unwritten.wait()
            await asyncio.sleep(self._pause)
            self._unwritten.clear()
            for name, held in list(self._held.items()):
                await self._write(name, held)

    async def _write(self, name: str, held: _Held) -> None:
        count = self._matched(held.override) if held.override is not None else 0
        status = PolicyStatus(held.generation, count, (held.problem,) if held.problem else ())
        if status == held.status or name not in self._held:
            return
        body = msgspec.json.encode({"status": status})
        try:
            await self._patch("PATCH", f"{PATH}/{quote(name, safe='')}/status", body=body, content_type=MERGE_PATCH)
        except ApiError as error:
            _log.warning("the status of a TenantPolicy cannot be written", policy=name, error=str(error), cure=_CURE)

    def _put(self, found: PolicyObject) -> None:
        name = found.metadata.name
        old = self._held.get(name)
        override, problem = self._read(bytes(found.spec))
        if override is None and old is not None:
            override = old.override
        self._held[name] = _Held(override, problem, found.metadata.generation, found.status)
        if problem and (old is None or old.problem != problem):
            _log.error("a TenantPolicy cannot be used; its last good form stays", policy=name, problem=problem)

    def _read(self, spec: bytes) -> tuple[Override | None, str]:
        try:
            override = configfile.convert(msgspec.json.decode(spec), Override)
        except msgspec.ValidationError as error:
            message, path = configfile.explain(error)
            field = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
            return None, printable(f"spec{field}: {message}")
        except UNDECODABLE as error:
            return None, printable(f"spec: {error}")
        if said := self._judge(override.policy):
            return None, f"spec.policy.{said}"
        return override, ""


_CURE = "allow list and watch on tenantpolicies.vcproxy.dev and patch on its status: see deploy/brain.yaml"
