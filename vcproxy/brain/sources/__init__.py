"""Tenant sources: where tenants are found, and how to read what they want.

A source tells of tenants through a synchronous sink; it owns discovery and nothing else. What it hands out is an
`Access`: credentials of an API server, or an `Input` of its own that brings objects without one. Everything that
follows (compiling, limits, isolation, fail static) is the same for all of them and not a source's business.

Rules for sources: identity is the uid, never a name. `TenantGone` is said only when the tenant is known to be deleted:
a source that cannot be read, or a credential that turned bad, says nothing about tenants and reports a problem.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn, Protocol

import msgspec

from vcproxy.kube.kubeconfig import Credentials
from vcproxy.kube.reflector import Event

Kind = Literal["Service", "EndpointSlice", "ServiceCIDR", "Pod", "Node", "TenantPolicy"]
ObjectSink = Callable[[Kind, Event[Any]], None]
"""Takes one event about objects of one kind, at once; neither blocks nor raises."""


class Input(Protocol):
    """Brings one tenant's objects."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Kind -> resourceVersion up to which everything was told. Kinds that have none are missing."""

    async def run(self, sink: ObjectSink) -> NoReturn:
        """Tell `sink` all there is, and what changes, for ever. Run again after it was cancelled, it lists again."""


Access = Credentials | Input


class TenantFound(msgspec.Struct, frozen=True):
    """A tenant exists and this is how to read it. Said again when its access changes.

    `access` None: it exists, but what there is to read it with cannot be used (yet). `namespace`, `labels`: of the
    object in the super cluster that is the tenant; policies are chosen by them. `strict`: the super cluster's Pods are
    known to tell of all its pods, so that, unless its policy says otherwise, endpoints must be among them.
    `restricted`: the server that the credentials name is not the operator's own choice, so policy says where it may be
    (apiservers.py).
    """

    uid: str
    name: str
    access: Access | None
    namespace: str = ""
    labels: Mapping[str, str] = {}
    strict: bool = True
    restricted: bool = False


class TenantGone(msgspec.Struct, frozen=True):
    """The tenant was deleted."""

    uid: str


class SourceComplete(msgspec.Struct, frozen=True):
    """Every tenant that this source knows of has been told: a tenant nobody named does not exist."""


class Problem(msgspec.Struct, frozen=True):
    """Something the source cannot use. What it said before stays. `subject` says what it is about: a path, a name."""

    subject: str
    message: str


SourceEvent = TenantFound | TenantGone | SourceComplete
SourceSink = Callable[[SourceEvent], None]


class Source(Protocol):
    """One place where tenants are found."""

    async def run(self, sink: SourceSink) -> NoReturn:
        """Tell of tenants for ever."""

    def problems(self) -> list[Problem]:
        """What is wrong now."""
