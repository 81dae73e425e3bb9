"""Real Kubernetes control planes on loopback: etcd, kube-apiserver and, where wanted, kube-controller-manager.

A control plane is what vcproxy reads, so tests use the real one: resource versions, watch caches, ClusterIP allocation
and EndpointSlice controllers have habits that no fake has. A plane has no nodes and no scheduler: whoever writes Pods
also writes their status. Everything lives in one directory (data, keys, logs) and in child processes that die with
this one.

Tuned to be light, since one super cluster and several tenants share the cores of a test machine with what they test:
only the API groups that a Service proxy meets, no admission plugins that need other controllers (ServiceAccount), no
priority and fairness, no fsync, and Go's collector told to run half as often. What is left as in production is what
vcproxy can notice: the watch cache, bookmarks, RBAC, dual-stack allocation, audit-free TLS with client certificates.

The interface is synchronous and may be used from any thread; in an asyncio test call `asyncio.to_thread(plane.kill)`.

    with ControlPlane("acme", directory) as plane:
        plane.client.create(service("web"))
"""

import base64
import functools
import http.client
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from e2e.apiclient import ApiClient
from e2e.polling import eventually
from e2e.processes import Port, Process
from vcproxy.ops.pki import Authority, KeyPair, signing_key

TENANT_SERVICE_CIDRS = ("10.32.0.0/16", "fd00:32::/108")
"""Ranges of a VirtualCluster tenant and of its super cluster, with a second family."""

BUILD = Path(__file__).parent / "tools" / "build"

# An address that this machine does not have (RFC 5737): the kubernetes Service of every plane gets an EndpointSlice
# with it, as in a real cluster, where 127.0.0.1 would be refused.
ADVERTISED = "192.0.2.1"

API_GROUPS = (
    "v1",
    "admissionregistration.k8s.io/v1",
    "apiextensions.k8s.io/v1",
    "apiregistration.k8s.io/v1",
    "apps/v1",
    "authentication.k8s.io/v1",
    "authorization.k8s.io/v1",
    "coordination.k8s.io/v1",
    "discovery.k8s.io/v1",
    "events.k8s.io/v1",
    "networking.k8s.io/v1",
    "rbac.authorization.k8s.io/v1",
    "scheduling.k8s.io/v1",
)
# Plugins that watch API groups which are not served (they would never be ready), that need controllers which do not
# run, or that judge what is inside a Pod.
DISABLED_ADMISSION = (
    "CertificateApproval",
    "CertificateSigning",
    "CertificateSubjectRestriction",
    "ClusterTrustBundleAttest",
    "DefaultStorageClass",
    "LimitRanger",
    "PersistentVolumeClaimResize",
    "PodSecurity",
    "ResourceQuota",
    "RuntimeClass",
    "ServiceAccount",
    "StorageObjectInUseProtection",
    "TaintNodesByCondition",
)
CONTROLLERS = ("endpointslice-controller", "endpointslice-mirroring-controller", "namespace-controller")

START_WITHIN = 60.0
"""Seconds a plane may take to be ready: some four on an idle machine, more when several start on busy cores."""
STOP_WITHIN = 10.0
"""Seconds a process may take to end after SIGTERM before it is killed."""


class MissingBinaries(RuntimeError):
    """The control plane's programs are neither built nor buildable; the message says what to do."""


def find_binaries(*, build: bool) -> Path:
    """The directory of etcd, kube-apiserver, kube-controller-manager and kube-proxy, as e2e/tools/build has it.

    build: build what is missing (some ten minutes on two cores, once), progress on stderr; without, a missing
    binary raises MissingBinaries.
    """
    if build:
        done = subprocess.run([str(BUILD)], stdout=subprocess.PIPE, text=True, check=False)
        cure = "the build failed, see its messages above"
    else:
        done = subprocess.run([str(BUILD), "--print-dir"], capture_output=True, text=True, check=False)
        cure = f"run {BUILD}"
    directory = Path(done.stdout.strip())
    if done.returncode:
        raise MissingBinaries(f"control plane binaries are missing in {directory}: {cure}")
    return directory


class ControlPlane:
    """One control plane. Built stopped; `start` (or `with`) runs it and returns when it serves.

    name: for messages, certificates and the kubeconfig's context.
    directory: made if missing; holds data, keys, logs and kubeconfig, and belongs to this plane alone.
    service_cidrs: one or two ranges, the first one's family is the default.
    address: IPv4 address of this machine that the API server listens on. Loopback, unless a peer in a network namespace
    must reach it: then this end of the veth that leads there.
    apiserver_flags: of kube-apiserver, besides those that every plane has.
    bin_dir: where the programs are; default: what e2e/tools/build has built.

    Address, certificates and kubeconfig stay the same over stop, kill, wipe_etcd and start, as they do for a plane
    behind a load balancer. Not thread-safe for two calls at once on the same plane.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        *,
        service_cidrs: tuple[str, ...] = TENANT_SERVICE_CIDRS,
        address: str = "127.0.0.1",
        apiserver_flags: tuple[str, ...] = (),
        bin_dir: Path | None = None,
    ) -> None:
        self.name = name
        self.directory = directory
        self.service_cidrs = service_cidrs
        self.authority = Authority(name, days=30)
        self.bin_dir = bin_dir or find_binaries(build=False)
        self._ports = tuple(Port() for _ in range(3))
        self._etcd_port, self._peer_port, self._api_port = (port.number for port in self._ports)
        self._address = address
        self.url = f"https://{address}:{self._api_port}"
        self.etcd_url = f"http://127.0.0.1:{self._etcd_port}"
        directory.mkdir(parents=True, exist_ok=True)
        self.kubeconfig = directory / "admin.kubeconfig"
        """An administrator's credentials (group system:masters), everything inline."""
        self.write_kubeconfig(self.kubeconfig, user="admin", groups=("system:masters",))
        self._write_keys()
        self._etcd = self._process("etcd", *self._etcd_flags())
        self._apiserver = self._process("kube-apiserver", *self._apiserver_flags(), *apiserver_flags)
        self._controller_manager = self._process("kube-controller-manager", *self._controller_manager_flags())
        self._wants_controller_manager = False

    # --- life ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start what is not running and return when the API serves: /readyz is ok and the kubernetes Service exists.

        Starts the controller manager too if `start_controller_manager` was ever called.
        Raises ProcessFailed if a program ends, TimeoutError after START_WITHIN seconds; both with the log's end.
        """
        try:
            for process in (self._etcd, self._apiserver):
                if not process.running:
                    process.start()
                    self._wait_until_ready(process)
            if self._wants_controller_manager and not self._controller_manager.running:
                self._controller_manager.start()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End all programs as a shutdown does: SIGTERM, and SIGKILL after STOP_WITHIN seconds. Idempotent."""
        self.thaw()
        # In this order: the API server writes to etcd while it shuts down, and waits long for an etcd that is gone.
        for process in (self._controller_manager, self._apiserver, self._etcd):
            process.terminate()
            process.wait(grace=STOP_WITHIN)

    def kill(self, *programs: str) -> None:
        """End these programs (default: all) as a power cut does: SIGKILL. Data that was acknowledged is kept.
        Idempotent.
        """
        for process in self._named(programs):
            process.kill()

    def restart(self) -> None:
        """Stop and start again: the same data at the same address; watches end, the watch cache starts empty."""
        self.stop()
        self.start()

    def freeze(self, *programs: str) -> None:
        """Stop these programs (default: all that run) where they are (SIGSTOP): connections open, nothing answers."""
        for process in self._named(programs):
            if process.running:
                process.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let frozen programs go on."""
        for process in self._processes:
            if process.running:
                process.signal(signal.SIGCONT)

    def wipe_etcd(self) -> None:
        """Lose all data, as when a control plane is made anew under the same address: resource versions begin again.

        A running plane is killed, wiped and started; a stopped one is wiped and stays stopped.
        """
        was_running = self.running
        self.kill()
        shutil.rmtree(self._data_dir, ignore_errors=True)
        if was_running:
            self.start()

    def forge(self, resource: str, found: Mapping[str, Any]) -> None:
        """Write an object into etcd, past all that the API server would refuse: a tenant owns its etcd.

        resource: its place there, such as "services/specs" or "endpointslices". JSON is one of the forms in which API
        servers read what is stored.
        """
        metadata = found["metadata"]
        key = f"/registry/{resource}/{metadata['namespace']}/{metadata['name']}"
        pair = {"key": key.encode(), "value": json.dumps(found).encode()}
        body = json.dumps({field: base64.b64encode(text).decode() for field, text in pair.items()})
        connection = http.client.HTTPConnection("127.0.0.1", self._etcd_port, timeout=10)
        try:
            connection.request("POST", "/v3/kv/put", body)
            answer = connection.getresponse()
            said = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise RuntimeError(f"etcd refused {key}: {answer.status} {said!r}")

    @contextmanager
    def behind_its_back(self) -> Iterator[str]:
        """The API server is stopped, and etcd at the address that is given: for those who write a lot. It then serves
        what is there, as after any restart."""
        self._apiserver.terminate()
        self._apiserver.wait(grace=STOP_WITHIN)
        yield f"127.0.0.1:{self._etcd_port}"
        self.start()

    def start_controller_manager(self) -> None:
        """Run kube-controller-manager from now on (CONTROLLERS only); `start` brings it back. Idempotent."""
        self._wants_controller_manager = True
        if not self._controller_manager.running:
            self._controller_manager.start()

    def close(self) -> None:
        """Kill, and give the ports back: the plane is not started again. Data and logs stay. Idempotent.

        Not a graceful stop, which takes a second and would tidy up data that nobody reads.
        """
        self.kill()
        self.client.close()
        for port in self._ports:
            port.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- looking ------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether the API server's process runs (frozen counts as running)."""
        return self._apiserver.running

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of what runs, by program name: benchmarks read /proc with them."""
        return {process.name.rpartition("/")[2]: process.pid for process in self._processes if process.running}

    @functools.cached_property
    def client(self) -> ApiClient:
        """A client with the administrator's credentials, made once."""
        return ApiClient(self.kubeconfig)

    def write_kubeconfig(self, path: Path, *, user: str, groups: tuple[str, ...] = ()) -> Path:
        """Write a kubeconfig with a new client certificate for a user, all inline (mode 0600), and return its path."""
        pair = self.authority.client(user, groups)
        content = yaml.safe_dump(_kubeconfig(self.name, self.url, self.authority.certificate, pair), sort_keys=False)
        path.touch(mode=0o600)
        path.write_text(content)
        return path

    # --- inside -------------------------------------------------------------------------------------------------

    @property
    def _processes(self) -> tuple[Process, ...]:
        return self._controller_manager, self._apiserver, self._etcd

    def _named(self, programs: tuple[str, ...]) -> list[Process]:
        """The processes of these programs, "etcd" for one; of all if none is named."""
        return [process for process in self._processes if not programs or process.name.rpartition("/")[2] in programs]

    @property
    def _data_dir(self) -> Path:
        return self.directory / "etcd"

    def _process(self, program: str, *flags: str) -> Process:
        # Of the environment only what programs need anywhere: no proxy, no KUBECONFIG, no GODEBUG of a developer.
        environment = {"PATH": os.defpath, "HOME": str(self.directory), "GOGC": "200"}
        return Process(
            f"{self.name}/{program}",
            [str(self.bin_dir / program), *flags],
            log=self.directory / f"{program}.log",
            environment=environment,
        )

    def _write_keys(self) -> None:
        names = ("kube-apiserver", "localhost", "kubernetes.default.svc", self._address, ADVERTISED)
        serving = self.authority.server(names)
        token_key, token_public_key = signing_key()
        for name, content in {
            "ca.crt": self.authority.certificate,
            "apiserver.crt": serving.certificate,
            "apiserver.key": serving.key,
            "token.key": token_key,
            "token.pub": token_public_key,
        }.items():
            file = self.directory / name
            file.touch(mode=0o600)
            file.write_bytes(content)

    def _etcd_flags(self) -> tuple[str, ...]:
        client, peer = self.etcd_url, f"http://127.0.0.1:{self._peer_port}"
        return (
            f"--data-dir={self._data_dir}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--name={self.name}",
            f"--initial-cluster={self.name}={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        )

    def _apiserver_flags(self) -> tuple[str, ...]:
        enabled = ",".join(f"{group}=true" for group in API_GROUPS)
        return (
            f"--etcd-servers={self.etcd_url}",
            f"--bind-address={self._address}",
            f"--secure-port={self._api_port}",
            f"--advertise-address={ADVERTISED}",
            f"--tls-cert-file={self.directory / 'apiserver.crt'}",
            f"--tls-private-key-file={self.directory / 'apiserver.key'}",
            f"--client-ca-file={self.directory / 'ca.crt'}",
            f"--service-account-key-file={self.directory / 'token.pub'}",
            f"--service-account-signing-key-file={self.directory / 'token.key'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-cluster-ip-range={','.join(self.service_cidrs)}",
            "--authorization-mode=RBAC",
            f"--disable-admission-plugins={','.join(DISABLED_ADMISSION)}",
            f"--runtime-config=api/all=false,{enabled}",
            "--enable-priority-and-fairness=false",
            "--profiling=false",
        )

    def _controller_manager_flags(self) -> tuple[str, ...]:
        return (
            f"--kubeconfig={self.kubeconfig}",
            f"--controllers={','.join(CONTROLLERS)}",
            "--leader-elect=false",
            "--secure-port=0",
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
        )

    def _wait_until_ready(self, process: Process) -> None:
        ready = self._etcd_is_ready if process is self._etcd else self._apiserver_is_ready

        def look() -> bool:
            process.check()
            return ready()

        try:
            eventually(look, within=START_WITHIN, every=0.05)
        except TimeoutError:
            reason = f"{process.name} was not ready within {START_WITHIN:g} s"
            raise TimeoutError(f"{reason}; the end of {process.log}:\n{process.log_tail()}") from None

    def _etcd_is_ready(self) -> bool:
        status, body = _get(http.client.HTTPConnection("127.0.0.1", self._etcd_port, timeout=2), "/health")
        return status == 200 and json.loads(body)["health"] == "true"

    def _apiserver_is_ready(self) -> bool:
        # /readyz does not wait for the controllers that make the namespaces and the kubernetes Service; with those
        # there, what a test sees in a new plane does not depend on when it looks.
        slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/kubernetes"
        return all(_get(self._https(), path)[0] == 200 for path in ("/readyz", slices))

    def _https(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(self._address, self._api_port, timeout=2, context=self.client.tls)


def start_together(planes: Iterable[ControlPlane]) -> None:
    """Start several planes at once; if one fails all are killed and its error is raised."""
    planes = tuple(planes)
    with ThreadPoolExecutor(max_workers=len(planes)) as pool:
        starts = [pool.submit(plane.start) for plane in planes]
    try:
        for start in starts:
            start.result()
    except BaseException:
        for plane in planes:
            plane.kill()
        raise


def _get(connection: http.client.HTTPConnection, path: str) -> tuple[int, bytes]:
    """Status and body of one request; (0, b"") if nobody answers."""
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def _kubeconfig(name: str, url: str, ca: bytes, pair: KeyPair) -> dict[str, object]:
    def inline(pem: bytes) -> str:
        return base64.b64encode(pem).decode()

    user = {"client-certificate-data": inline(pair.certificate), "client-key-data": inline(pair.key)}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": {"server": url, "certificate-authority-data": inline(ca)}}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "current-context": name,
    }
