"""What a project that hosts control planes must say of itself, so that its tenants can be found (hosted.py).

Each project keeps one object per tenant in the super cluster, and the tenant's kubeconfig in a Secret. Which objects,
which Secret, which key in it: that is all that differs, and it is plain functions of one object.
"""

import base64
import binascii
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

import msgspec

from vcproxy.brain.sources.attribution import Mark
from vcproxy.kube.decode import HasKey, Key, Resource
from vcproxy.kube.kubeconfig import Credentials
from vcproxy.kube.shapes import Metadata, Shape

T = TypeVar("T", bound=HasKey)

KEYS = (
    "value",
    "admin-kubeconfig",
    "admin.svc",
    "super-admin.svc",
    "admin.conf",
    "super-admin.conf",
    "kubeconfig",
    "config",
)
"""Keys of Secrets under which kubeconfigs are found."""


def _field(key: str) -> str:
    return key.replace("-", "_").replace(".", "_")


Data = msgspec.defstruct(
    "Data",
    [(_field(key), str, "") for key in KEYS],
    frozen=True,
    gc=False,
    rename={_field(key): key for key in KEYS},
)
"""data of a Secret: the kubeconfigs in it, base64. Everything else is skipped while decoding: CAs' private keys too."""


class Secret(Shape, frozen=True):
    """v1 Secret."""

    metadata: Metadata
    data: Data | None = None  # type: ignore[valid-type]

    @property
    def key(self) -> Key:
        """(namespace, name)."""
        return self.metadata.namespace, self.metadata.name

    def text(self, key: str) -> str:
        """The base64 text under one of KEYS; "" if there is none."""
        return str(getattr(self.data, _field(key))) if self.data is not None else ""


SECRETS = Resource("Secret", "/api/v1/secrets", Secret)


class Unready(Exception):
    """The tenant cannot be read yet; the text says why."""


class Tenancy(msgspec.Struct, frozen=True):
    """Where the kubeconfig of an object's tenant is.

    `secret`: (namespace, name) and `keys`: the first of these that it has. `inline`: the kubeconfig itself, base64, if
    the object has it: then no Secret counts.
    """

    secret: Key
    keys: tuple[str, ...]
    inline: str | None = None


class Project(ABC, Generic[T]):
    """One project. `title`: its field in the configuration.

    `group`, `versions` (newest first) and `plural`: where its objects are; group "" and one version for Kubernetes' own
    kinds. `objects` and `secrets` select what to follow; the path of `objects` is that of Kubernetes' own kinds, or
    made from group and version. `shares_nodes`: its tenants' pods are Pods of the super cluster.
    """

    title: ClassVar[str]
    group: ClassVar[str]
    versions: ClassVar[tuple[str, ...]]
    plural: ClassVar[str]
    objects: ClassVar[Resource[Any]]  # of T
    secrets: ClassVar[Resource[Secret]]
    shares_nodes: ClassVar[bool] = False

    @abstractmethod
    def tenancy(self, found: T) -> Tenancy:
        """Where the tenant's kubeconfig is. Raises Unready."""

    def stands(self, secret: Key) -> bool:
        """Whether `secrets` selects this one; else it is followed by itself."""
        return True

    def reach(self, found: T, credentials: Credentials) -> Credentials:
        """The same credentials with the server as the brain reaches it."""
        return credentials

    def marks(self, found: T) -> tuple[Mark, ...]:
        """What Pods of this tenant, and of its control plane, carry of the project's."""
        return ()


def decode_kubeconfig(text: str) -> bytes:
    """From base64; line ends in it are skipped, as Go does. Raises Unready."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise Unready("the kubeconfig is not base64") from None
