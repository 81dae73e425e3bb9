"""Access to the super cluster's API server, shared by all who read it.

The kubeconfig is the operator's own file and may be rewritten at any time (kubelet-style certificates, an API server
that moved), so it is read again now and then; a service account's token rotates by itself in the client. Whoever reads
the super cluster takes an `ApiInput` from here, and new credentials reach all of them: there is one place that knows
which credentials are good.

It also knows where that API server is: no tenant's kubeconfig may lead the brain there (apiservers.py).
"""

import asyncio
import socket
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from yarl import URL

from vcproxy.brain.config import SuperCluster
from vcproxy.brain.expiry import Expiries
from vcproxy.brain.inputs import ApiInput
from vcproxy.brain.slices import SERVICE_NAME
from vcproxy.brain.superage import SuperAge
from vcproxy.kube import shapes
from vcproxy.kube.client import Client
from vcproxy.kube.client import Limits as ClientLimits
from vcproxy.kube.decode import ENDPOINT_SLICES, Resource
from vcproxy.kube.errors import ApiError, KubeconfigError
from vcproxy.kube.kubeconfig import Credentials, in_cluster, load_kubeconfig_file
from vcproxy.kube.reflector import Timing
from vcproxy.kube.servers import normalise_server
from vcproxy.model.addresses import readable_addresses
from vcproxy.model.tenant import SUPER_UID
from vcproxy.ops import logs
from vcproxy.ops.configfile import ConfigError

READ_AGAIN_SECONDS = 10.0
UNRATIONED = Timing(share=1.0)
"""The super cluster is nobody's tenant: all others wait for what it says of pods and nodes."""
ROOMY = ClientLimits(list_bytes=16 << 30, list_objects=10_000_000, list_seconds=1800.0)
"""Nor is there anybody to protect from it. 100,000 Services of 10 endpoints are lists of 540 MB, more than a tenant may
have."""

_log = logs.get("supercluster")


class SuperAccess:
    """Credentials of the super cluster; `await run()` within a TaskGroup keeps them fresh.

    `guarded`: whether to find out all addresses of the API server, those of its own Service too.
    Raises ConfigError when the credentials cannot be used.
    """

    def __init__(self, config: SuperCluster, *, guarded: bool = False) -> None:
        self._config = config
        self._guarded = guarded
        self._inputs: weakref.WeakSet[ApiInput] = weakref.WeakSet()
        self.age = SuperAge(lambda: self._inputs)
        self._problem = ""
        self._addresses: frozenset[bytes] = frozenset()
        try:
            self.credentials = credentials_of(config)
            self._client = Client(self.credentials, tenant=SUPER_UID, limits=ROOMY)
        except KubeconfigError as error:
            raise ConfigError(f"superCluster: {error}; or set superCluster: null if there is none") from error
        self.expiries = Expiries()
        self.expiries.put(SUPER_UID, self.credentials)

    @property
    def problem(self) -> str:
        """Why the kubeconfig as it is now cannot be used; "": it is in use."""
        return self._problem

    @property
    def addresses(self) -> frozenset[bytes]:
        """Where the API server is or was; 4 or 16 octets each. Empty before it was first looked up."""
        return self._addresses

    @property
    def client(self) -> Client:
        """For single requests, with the newest credentials. Do not keep it: a rotation closes it."""
        return self._client

    def input(self, resources: Sequence[Resource[Any]], *, timing: Timing = UNRATIONED) -> ApiInput:
        """An input of these kinds, whose credentials are kept fresh for as long as somebody holds it.

        Raises KubeconfigError.
        """
        made = ApiInput(
            self.credentials, tenant=SUPER_UID, resources=resources, limits=ROOMY, timing=timing, told=self.age.told
        )
        self._inputs.add(made)
        return made

    async def endpoint_slices(self, namespace: str, service: str) -> tuple[shapes.EndpointSlice, ...]:
        """Of a Service of the super cluster, as they are now. Raises ApiError."""
        path, params = ENDPOINT_SLICES.within(namespace).path, {"labelSelector": f"{SERVICE_NAME}={service}"}
        return (await self._client.get_json(path, _Slices, params=params)).items or ()

    async def run(self) -> NoReturn:
        """Read and look up again, for ever."""
        try:
            while True:
                self.expiries.tell()
                dialled = await asyncio.to_thread(_dialled, self.credentials.server)
                served = await self._served() if self._guarded else ()
                # What was known once stays: an address too many keeps a tenant out, one too few lets it in.
                self._addresses |= {*dialled, *served}
                await asyncio.sleep(READ_AGAIN_SECONDS)
                await self._read_again()
        finally:
            await self._client.close()

    async def _read_again(self) -> None:
        try:
            credentials = await asyncio.to_thread(credentials_of, self._config)
            if credentials != self.credentials:
                client = Client(credentials, tenant=SUPER_UID)
                for held in list(self._inputs):
                    await held.rotate(credentials)
                self.credentials = credentials
                self.expiries.put(SUPER_UID, credentials)
                old, self._client = self._client, client
                await old.close()
                _log.info("credentials rotated", tenant=SUPER_UID)
            self._problem = ""
        except KubeconfigError as error:
            self._problem = f"{error}; the last good credentials stay in use"

    async def _served(self) -> list[bytes]:
        """The addresses of the Service default/kubernetes and of its endpoints; [] while nobody answers."""
        try:
            service = await self._client.get_json(
                "/api/v1/namespaces/default/services", _Services, params={"fieldSelector": "metadata.name=kubernetes"}
            )
            slices = await self.endpoint_slices("default", "kubernetes")
        except ApiError:
            return []
        texts = [text for found in service.items or () for text in (found.spec.cluster_ip, *found.spec.cluster_ips)]
        for held in slices:
            texts.extend(text for endpoint in held.endpoints or () for text in endpoint.addresses)
        return readable_addresses(texts)


def credentials_of(config: SuperCluster) -> Credentials:
    """What the configuration says how to reach the super cluster with. Reads files. Raises KubeconfigError."""
    found = load_kubeconfig_file(Path(config.kubeconfig)) if config.kubeconfig else in_cluster()
    return replace(found, server=normalise_server(config.server)) if config.server else found


class _Services(msgspec.Struct):
    items: tuple[shapes.Service, ...] | None = None


class _Slices(msgspec.Struct):
    items: tuple[shapes.EndpointSlice, ...] | None = None


def _dialled(server: str) -> list[bytes]:
    """All addresses of the server's host; [] if it cannot be looked up now."""
    url = URL(server)
    try:
        infos = socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return readable_addresses(str(info[4][0]) for info in infos)
