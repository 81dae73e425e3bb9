"""The cluster's control plane: etcd, API server, controllers and scheduler on a machine of its own.

Not `e2e.controlplane.ControlPlane`, which is many small API servers without nodes on one machine's loopback: a cluster
with kubelets needs every API group, the admission plugins, service accounts with their tokens, and all controllers. What
the two share is how users are told apart: by client certificates of an authority made for the occasion.
"""

import base64
import http.client
from collections.abc import Callable
from pathlib import Path

import yaml

from e2e.apiclient import ApiClient, ApiError
from e2e.cluster.addresses import API_PORT, API_SERVER, API_SERVICE, CONTROL, POD_CIDRS, SERVICE_CIDRS
from e2e.cluster.machine import Machine
from e2e.polling import eventually
from vcproxy.ops.pki import Authority, signing_key

START_WITHIN = 120.0
"""Seconds that a program may take to be ready; the API server takes six on an idle machine."""
ISSUER = "https://kubernetes.default.svc.cluster.local"
_ETCD = "http://127.0.0.1:2379"


class Control:
    """The control plane on a machine. `directory`: for keys and kubeconfigs; `programs`: folders of the binaries."""

    def __init__(self, machine: Machine, directory: Path, programs: dict[str, Path]) -> None:
        self.machine = machine
        self.authority = Authority("cluster", days=7)
        self._directory = directory
        self._programs = programs
        self._write_keys()
        self.admin = self.kubeconfig("admin", groups=("system:masters",))
        """The kubeconfig of an administrator."""
        self.client = ApiClient(self.admin, ns=machine.ns)

    def kubeconfig(self, user: str, *, groups: tuple[str, ...] = ()) -> Path:
        """Write a kubeconfig with a client certificate for a user, everything inline; returns its path."""
        pair = self.authority.client(user, groups)
        inline = {
            key: base64.b64encode(pem).decode()
            for key, pem in (("client-certificate-data", pair.certificate), ("client-key-data", pair.key))
        }
        ca = base64.b64encode(self.authority.certificate).decode()
        path = self._directory / f"{user.replace(':', '-')}.kubeconfig"
        path.touch(mode=0o600)
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "e2e", "cluster": {"server": API_SERVER, "certificate-authority-data": ca}}],
                    "users": [{"name": user, "user": inline}],
                    "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": user}}],
                    "current-context": "e2e",
                }
            )
        )
        return path

    def start(self) -> None:
        """Start everything; returns when the API serves. Raises MachineFailed or TimeoutError, with the log's end."""
        self._start("etcd", self._etcd_flags())
        self._start("kube-apiserver", self._apiserver_flags())
        self._wait("kube-apiserver", self._serves)
        for name, user in (
            ("kube-controller-manager", "system:kube-controller-manager"),
            ("kube-scheduler", "system:kube-scheduler"),
        ):
            config = str(self.kubeconfig(user))
            access = [
                f"--{use}={config}" for use in ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")
            ]
            extra = self._controller_flags() if name == "kube-controller-manager" else []
            self._start(name, [*access, "--leader-elect=false", *extra])

    def kubectl(self, *arguments: str, stdin: str = "", timeout: float = 120.0) -> str:
        """Run kubectl as the administrator; its output. Raises MachineFailed with its words if it fails."""
        kubectl = str(self._programs["kubectl"])
        return self.machine.run(kubectl, f"--kubeconfig={self.admin}", *arguments, stdin=stdin, timeout=timeout).stdout

    def _start(self, program: str, flags: list[str]) -> None:
        self.machine.start(program, [str(self._programs[program]), *flags])

    def _wait(self, program: str, ready: Callable[[], bool]) -> None:
        def look() -> bool:
            self.machine.check(program)
            return ready()

        try:
            eventually(look, within=START_WITHIN, every=0.1)
        except TimeoutError:
            raise TimeoutError(
                f"{program} was not ready within {START_WITHIN:g} s; {self.machine.tail(program)}"
            ) from None

    def _serves(self) -> bool:
        try:
            self.client.request("GET", "/readyz")
            self.client.get("Service", "kubernetes", "default")
        except (OSError, http.client.HTTPException, ApiError):
            return False
        return True

    def _write_keys(self) -> None:
        service = "kubernetes.default.svc"
        names = ("kube-apiserver", "kubernetes", "kubernetes.default", service, f"{service}.cluster.local")
        token_key, token_public_key = signing_key()
        self.authority.server((*names, "127.0.0.1", *CONTROL, *API_SERVICE)).write(self._directory, "apiserver")
        self.authority.client("front-proxy-client").write(self._directory, "front-proxy")
        kubelet_client = self.authority.client("kube-apiserver-kubelet-client", ("system:masters",))
        kubelet_client.write(self._directory, "kubelet-client")
        for name, content in {
            "ca.crt": self.authority.certificate,
            "token.key": token_key,
            "token.pub": token_public_key,
        }.items():
            file = self._directory / name
            file.touch(mode=0o600)
            file.write_bytes(content)

    def _etcd_flags(self) -> list[str]:
        return [
            "--data-dir=/var/lib/etcd",
            f"--listen-client-urls={_ETCD}",
            f"--advertise-client-urls={_ETCD}",
            "--listen-peer-urls=http://127.0.0.1:2380",
            "--unsafe-no-fsync",
            "--log-level=warn",
        ]

    def _apiserver_flags(self) -> list[str]:
        keys = self._directory
        return [
            f"--etcd-servers={_ETCD}",
            "--bind-address=0.0.0.0",
            f"--secure-port={API_PORT}",
            f"--advertise-address={CONTROL[0]}",
            f"--tls-cert-file={keys}/apiserver.crt",
            f"--tls-private-key-file={keys}/apiserver.key",
            f"--client-ca-file={keys}/ca.crt",
            f"--service-account-key-file={keys}/token.pub",
            f"--service-account-signing-key-file={keys}/token.key",
            f"--service-account-issuer={ISSUER}",
            f"--service-cluster-ip-range={','.join(SERVICE_CIDRS)}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged",
            "--kubelet-preferred-address-types=InternalIP",
            f"--kubelet-client-certificate={keys}/kubelet-client.crt",
            f"--kubelet-client-key={keys}/kubelet-client.key",
            # Aggregated API servers: upstream has tests with one.
            f"--requestheader-client-ca-file={keys}/ca.crt",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={keys}/front-proxy.crt",
            f"--proxy-client-key-file={keys}/front-proxy.key",
        ]

    def _controller_flags(self) -> list[str]:
        return [
            "--use-service-account-credentials",
            f"--service-account-private-key-file={self._directory}/token.key",
            f"--root-ca-file={self._directory}/ca.crt",
            f"--cluster-cidr={','.join(POD_CIDRS)}",
            f"--service-cluster-ip-range={','.join(SERVICE_CIDRS)}",
            "--allocate-node-cidrs=false",
        ]
