"""The Leases of brains and shards in the super cluster's API server: lists and conditional writes.

Names carry the number of shards, and so does a label by which they are listed: brains of two configurations are two
groups that know nothing of each other, and each feeds everything, rather than that a tenant is of shard 3 to one and of
shard 19 to another.

Requests have a client of their own with a deadline that fits an election; the super cluster's other requests may take
longer than a Lease lives.
"""

import datetime
import re
import time
from collections.abc import Callable
from urllib.parse import quote

import msgspec

from vcproxy.brain.election import Act, Lease, Step
from vcproxy.kube import shapes
from vcproxy.kube.client import Client, Limits
from vcproxy.kube.errors import BadResponse
from vcproxy.kube.kubeconfig import Credentials
from vcproxy.model.tenant import SUPER_UID

LABEL = "vcproxy.dev/shards"
_SHARD = re.compile(r"vcproxy-shard-([0-9]+)-of-[0-9]+")


class LeaseMetadata(shapes.Shape, frozen=True):
    """metadata of a Lease."""

    name: str
    resource_version: str = ""


class LeaseSpec(shapes.Shape, frozen=True):
    """spec of a Lease."""

    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    acquire_time: str | None = None
    lease_transitions: int | None = None


class LeaseObject(shapes.Shape, frozen=True):
    """coordination.k8s.io/v1 Lease."""

    metadata: LeaseMetadata
    spec: LeaseSpec = LeaseSpec()


class _Leases(shapes.Shape, frozen=True):
    items: tuple[LeaseObject, ...] | None = None


class LeaseClient:
    """Leases of the brain `me` and its peers, in `namespace`, for this number of shards.

    `credentials`: the newest; asked at each request, so that rotation needs no care. `lease_seconds`: how long what is
    written counts. Methods raise ApiError, and KubeconfigError for credentials that cannot be used.
    """

    def __init__(
        self,
        credentials: Callable[[], Credentials],
        *,
        namespace: str,
        me: str,
        shards: int,
        lease_seconds: int,
        timeout: float,
    ) -> None:
        self._credentials = credentials
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{quote(namespace, safe='')}/leases"
        self._namespace = namespace
        self._me = me
        self._shards = shards
        self._seconds = lease_seconds
        self._limits = Limits(connect_seconds=timeout, request_seconds=timeout)
        self._client: Client | None = None

    async def list(self) -> list[Lease]:
        """All of this group, as they are now."""
        client = await self._ready()
        found = await client.get_json(self._path, _Leases, params={"labelSelector": f"{LABEL}={self._shards}"})
        return [_lease(each) for each in found.items or ()]

    async def do(self, step: Step) -> Lease | None:
        """Do a step of the election; None: the Lease is gone. Conflict or NotFound: it is not as the step has it."""
        client = await self._ready()
        name = self._name(step)
        if step.act is Act.REMOVE:
            assert step.before is not None
            options = {"preconditions": {"resourceVersion": step.before.version}}
            await client.request("DELETE", f"{self._path}/{name}", body=msgspec.json.encode(options))
            return None
        body = msgspec.json.encode(self._object(name, step))
        if step.before is None:
            answer = await client.request("POST", self._path, body=body)
        else:
            answer = await client.request("PUT", f"{self._path}/{name}", body=body)
        try:
            return _lease(msgspec.json.decode(answer, type=LeaseObject))
        except msgspec.DecodeError as error:
            raise BadResponse(tenant=SUPER_UID, path=self._path, message=str(error)) from None

    async def close(self) -> None:
        """Close all connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def _ready(self) -> Client:
        credentials = self._credentials()
        if self._client is None or self._client.credentials != credentials:
            await self.close()
            self._client = Client(credentials, tenant=SUPER_UID, limits=self._limits)
        return self._client

    def _name(self, step: Step) -> str:
        if isinstance(step.key, int):
            return f"vcproxy-shard-{step.key}-of-{self._shards}"
        return f"vcproxy-brain-{step.key}"

    def _object(self, name: str, step: Step) -> dict[str, object]:
        before, now = step.before, _now()
        goes_on = before is not None and before.holder == self._me and before.acquired
        spec = {
            "holderIdentity": self._me if step.act is Act.HOLD else "",
            "leaseDurationSeconds": self._seconds if step.act is Act.HOLD else 1,
            "renewTime": now,
            "acquireTime": before.acquired if before is not None and goes_on else now,
            "leaseTransitions": before.transitions + (not goes_on and step.act is Act.HOLD)
            if before is not None
            else 0,
        }
        version = {"resourceVersion": before.version} if before is not None else {}
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {
                "name": name,
                "namespace": self._namespace,
                "labels": {LABEL: str(self._shards)},
                **version,
            },
            "spec": spec,
        }


def _lease(found: LeaseObject) -> Lease:
    spec, name = found.spec, found.metadata.name
    shard = _SHARD.fullmatch(name)
    return Lease(
        key=int(shard[1]) if shard else name.removeprefix("vcproxy-brain-"),
        holder=spec.holder_identity or "",
        version=found.metadata.resource_version,
        seconds=float(spec.lease_duration_seconds or 0),
        transitions=spec.lease_transitions or 0,
        acquired=spec.acquire_time or "",
    )


def _now() -> str:
    return datetime.datetime.fromtimestamp(time.time(), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
