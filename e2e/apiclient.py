"""A small Kubernetes client for tests: the hand that changes what vcproxy watches.

Synchronous, on the standard library, so that it shares nothing with the client under test: a bug in vcproxy's TLS,
JSON or HTTP code must not be able to hide in the tests' own. Objects are plain dicts as in JSON (see e2e.objects for
builders). Every answer carries the time at which it was complete, because what tests measure is how long after the
API server's answer a change arrived elsewhere.

Usable from several threads at once (each request takes a connection out of a pool); from asyncio use
`asyncio.to_thread`, above all with a frozen or killed API server.
"""

import base64
import contextlib
import http.client
import json
import os
import select
import ssl
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vcproxy.lab import netns

Object = dict[str, Any]


@dataclass(frozen=True)
class Resource:
    """Where objects of a kind live. api_version: "v1" or "GROUP/VERSION"; plural: as in the path."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None, name: str = "", subresource: str = "") -> str:
        """The URL's path. A namespaced resource with namespace None means that resource in all namespaces."""
        parts = [f"/api/{self.api_version}" if "/" not in self.api_version else f"/apis/{self.api_version}"]
        if self.namespaced and namespace is not None:
            parts += ["namespaces", namespace]
        parts += [part for part in (self.plural, name, subresource) if part]
        return "/".join(parts)


RESOURCES = {
    resource.kind: resource
    for resource in (
        Resource("v1", "ConfigMap", "configmaps"),
        Resource("v1", "Endpoints", "endpoints"),
        Resource("v1", "Event", "events"),
        Resource("v1", "Namespace", "namespaces", namespaced=False),
        Resource("v1", "Node", "nodes", namespaced=False),
        Resource("v1", "Pod", "pods"),
        Resource("v1", "Secret", "secrets"),
        Resource("v1", "Service", "services"),
        Resource("v1", "ServiceAccount", "serviceaccounts"),
        Resource("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions", namespaced=False),
        Resource("discovery.k8s.io/v1", "EndpointSlice", "endpointslices"),
        Resource("networking.k8s.io/v1", "ServiceCIDR", "servicecidrs", namespaced=False),
        Resource("rbac.authorization.k8s.io/v1", "ClusterRole", "clusterroles", namespaced=False),
        Resource("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "clusterrolebindings", namespaced=False),
        Resource("rbac.authorization.k8s.io/v1", "Role", "roles"),
        Resource("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings"),
    )
}
"""What methods accept by kind; for a custom resource pass a Resource of your own instead of the kind."""


@dataclass(frozen=True)
class Answer:
    """A successful answer. object: the JSON body; sent, answered: time.monotonic() before the request was written and
    after the body was complete (CLOCK_MONOTONIC: comparable between processes of one machine)."""

    object: Object
    sent: float
    answered: float

    @property
    def items(self) -> list[Object]:
        """The objects of a list."""
        items: list[Object] = self.object["items"]
        return items

    @property
    def resource_version(self) -> str:
        version: str = self.object["metadata"]["resourceVersion"]
        return version


class ApiError(Exception):
    """The API server refused: HTTP status, Kubernetes' reason ("NotFound", "Conflict", ...) and message."""

    def __init__(self, request: str, status: int, reason: str, message: str) -> None:
        super().__init__(f"{request}: {status} {reason}: {message}")
        self.status = status
        self.reason = reason


class ApiClient:
    """A client for one API server. A server that does not answer raises TimeoutError after `timeout` seconds, one that
    is gone ConnectionError, one that refuses ApiError.

    ns: the network namespace where the server's address means something (`vcproxy.lab.netns`); default: this one.
    """

    def __init__(self, kubeconfig: Path, *, timeout: float = 10.0, ns: str | None = None) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        url = urllib.parse.urlsplit(cluster["server"])
        self._host, self._port, self._timeout, self._ns = url.hostname or "", url.port or 443, timeout, ns
        self.tls = _tls(
            base64.b64decode(cluster["certificate-authority-data"]),
            base64.b64decode(user["client-certificate-data"]),
            base64.b64decode(user["client-key-data"]),
        )
        self._idle: list[http.client.HTTPSConnection] = []

    def create(self, obj: Object, *, resource: Resource | None = None) -> Answer:
        """Create an object in the namespace that its metadata names."""
        resource = resource or RESOURCES[obj["kind"]]
        return self.request("POST", resource.path(obj["metadata"].get("namespace")), body=obj)

    def create_all(self, objects: Iterable[Object], *, workers: int = 8) -> list[Answer]:
        """Create many objects, `workers` at a time; answers in the order of the objects."""
        with ThreadPoolExecutor(max_workers=workers) as pool:
            return list(pool.map(self.create, objects))

    def get(self, kind: str | Resource, name: str, namespace: str | None = None) -> Answer:
        return self.request("GET", _resource(kind).path(namespace, name))

    def list(self, kind: str | Resource, namespace: str | None = None, *, labels: str = "") -> Answer:
        """All objects of a kind in a namespace (None: in all); labels: a label selector, e.g. "app=web,tier!=db"."""
        return self.request("GET", _resource(kind).path(namespace), query={"labelSelector": labels} if labels else {})

    def update(self, obj: Object, *, resource: Resource | None = None) -> Answer:
        """Replace an object; with a resourceVersion in its metadata only if it is still the latest (else Conflict)."""
        resource = resource or RESOURCES[obj["kind"]]
        metadata = obj["metadata"]
        return self.request("PUT", resource.path(metadata.get("namespace"), metadata["name"]), body=obj)

    def patch(
        self,
        kind: str | Resource,
        name: str,
        patch: Mapping[str, Any],
        namespace: str | None = None,
        *,
        subresource: str = "",
    ) -> Answer:
        """Change fields (RFC 7396 merge patch: null deletes, lists are replaced whole)."""
        path = _resource(kind).path(namespace, name, subresource)
        return self.request("PATCH", path, body=patch, content_type="application/merge-patch+json")

    def patch_status(
        self, kind: str | Resource, name: str, status: Mapping[str, Any], namespace: str | None = None
    ) -> Answer:
        """Change fields of the status: what kubelet, node and load balancer controllers do."""
        return self.patch(kind, name, {"status": status}, namespace, subresource="status")

    def delete(
        self, kind: str | Resource, name: str, namespace: str | None = None, *, grace_period: int | None = None
    ) -> Answer:
        """Delete an object. grace_period: seconds; a Pod on a node stays "terminating" until deleted with 0."""
        query = {} if grace_period is None else {"gracePeriodSeconds": str(grace_period)}
        return self.request("DELETE", _resource(kind).path(namespace, name), query=query)

    def delete_all(self, kind: str | Resource, namespace: str | None = None, *, labels: str = "") -> Answer:
        """Delete all objects of a kind in a namespace at once, with no grace."""
        query = {"gracePeriodSeconds": "0"} | ({"labelSelector": labels} if labels else {})
        return self.request("DELETE", _resource(kind).path(namespace), query=query)

    def request(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Answer:
        """One request, for whatever the other methods do not cover."""
        target = f"{path}?{urllib.parse.urlencode(query)}" if query else path
        content = None if body is None else json.dumps(body).encode()
        headers = {"Accept": "application/json"} | ({"Content-Type": content_type} if content else {})
        with self._connection() as connection:
            sent = time.monotonic()
            connection.request(method, target, content, headers)
            response = connection.getresponse()
            data = response.read()
            answered = time.monotonic()
        answer: Object = json.loads(data) if data[:1] == b"{" else {"message": data.decode(errors="replace")}
        if response.status >= 300:
            reason, message = answer.get("reason", response.reason), answer.get("message", "")
            raise ApiError(f"{method} {path}", response.status, reason, message)
        return Answer(answer, sent, answered)

    def close(self) -> None:
        """Close idle connections."""
        while self._idle:
            self._idle.pop().close()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[http.client.HTTPSConnection]:
        # list.pop and list.append are atomic, so the pool needs no lock. A kept connection whose server has gone would
        # fail its next request; peeking at the socket finds that out without sending anything twice.
        while self._idle:
            connection = self._idle.pop()
            if _is_open(connection):
                break
            connection.close()
        else:
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout, context=self.tls)
            with netns.entered(self._ns) if self._ns else contextlib.nullcontext():
                connection.connect()
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)


def _resource(kind: str | Resource) -> Resource:
    return kind if isinstance(kind, Resource) else RESOURCES[kind]


def _is_open(connection: http.client.HTTPSConnection) -> bool:
    """Whether nothing waits to be read: between requests that can only be the end of the connection."""
    if connection.sock is None:
        return False
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return not poll.poll(0)


def _tls(ca: bytes, certificate: bytes, key: bytes) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=ca.decode())
    # Python loads a client key only from a file, so it gets one that is in memory only.
    file = os.memfd_create("client", os.MFD_CLOEXEC)
    try:
        os.write(file, key + certificate)
        context.load_cert_chain(f"/proc/self/fd/{file}")
    finally:
        os.close(file)
    return context
