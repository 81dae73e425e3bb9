"""Kubeconfigs, read as hostile input.

A kubeconfig is a program: `exec` runs a command, `tokenFile` sends any file of this machine to any server,
`proxy-url` and `server` choose who is spoken to. The Secrets that hold tenants' kubeconfigs are written by tenants,
or by controllers that tenants can steer, so nothing here executes, opens or connects. The loader knows the few fields
that carry inline credentials, and refuses every other field of the chosen cluster and user by name: a field that is
skipped in silence is a credential somebody relied on.

Two kubeconfigs are the operator's own: the super cluster's, and the service account's. For those `trusted=True`
allows paths of files (never `exec`: the brain's credentials do not depend on programs that happen to be installed
next to it).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import ssl
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from vcproxy.kube.documents import MAX_BYTES, parse
from vcproxy.kube.errors import KubeconfigError, printable
from vcproxy.kube.servers import is_host_name, normalise_server

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """How to reach one API server and prove who is asking. Comparing two detects a rotation.

    server: `https://HOST:PORT[/PREFIX]`, normalised, no trailing slash; IPv6 hosts in brackets.
    ca_pem: certificates that may sign the server's; empty (trusted kubeconfigs only): those of the operating system.
    client_cert_pem, client_key_pem: both or none; the key is not encrypted.
    token: bearer token. token_file: a file to read the token from, again whenever it changes (trusted only).
    tls_server_name: the name expected in the server's certificate; empty: the host of `server`.
    """

    server: str
    ca_pem: bytes = b""
    client_cert_pem: bytes = b""
    client_key_pem: bytes = b""
    token: str = ""
    token_file: str = ""
    tls_server_name: str = ""

    def __repr__(self) -> str:
        """Names what is there, shows no secret: of the certificate the head of its SHA-256, of tokens nothing."""
        cert = hashlib.sha256(self.client_cert_pem).hexdigest()[:12] if self.client_cert_pem else "-"
        token = "<redacted>" if self.token else self.token_file or "-"
        name = f", tls_server_name={self.tls_server_name!r}" if self.tls_server_name else ""
        return f"Credentials(server={self.server!r}{name}, client_cert={cert}, token={token})"


def load_kubeconfig(data: bytes, *, trusted: bool = False, base: Path | None = None) -> Credentials:
    """Credentials of the current context of a kubeconfig (YAML or JSON).

    `trusted` is for the operator's own file only: it allows `certificate-authority`, `client-certificate`,
    `client-key` and `tokenFile`; relative paths are relative to `base` (the kubeconfig's folder), as kubectl has it.

    Raises KubeconfigError, which names the field and the cure and holds no secret.
    """
    document = _mapping(parse(data), "document")
    context = _current_context(document)
    cluster = _named(document, "clusters", "cluster", _text(context, "context", "cluster"))
    user = _named(document, "users", "user", _text(context, "context", "user"))
    _refuse_dangerous(cluster, "cluster", _CLUSTER_FIELDS, trusted=trusted)
    _refuse_dangerous(user, "user", _USER_FIELDS, trusted=trusted)

    ca_pem = _data(cluster, "cluster", "certificate-authority", base=base)
    cert_pem = _data(user, "user", "client-certificate", base=base)
    key_pem = _data(user, "user", "client-key", base=base)
    token, token_file = _text(user, "user", "token"), _text(user, "user", "tokenFile")
    if token_file:
        token, token_file = "", str(_resolve(token_file, base))  # kubectl: the file wins over the inline token
    tls_server_name = _text(cluster, "cluster", "tls-server-name")
    if tls_server_name and not is_host_name(tls_server_name):
        _refuse("cluster.tls-server-name", "is not a host name", cure="write the DNS name in the server's certificate")
    credentials = Credentials(
        server=normalise_server(_text(cluster, "cluster", "server")),
        ca_pem=ca_pem,
        client_cert_pem=cert_pem,
        client_key_pem=key_pem,
        token=token,
        token_file=token_file,
        tls_server_name=tls_server_name,
    )
    _check(credentials, system_roots=trusted)
    return credentials


def load_kubeconfig_file(path: Path) -> Credentials:
    """Credentials of the operator's own kubeconfig file (`trusted`). Raises KubeconfigError."""
    return load_kubeconfig(read_bounded(path, "kubeconfig"), trusted=True, base=path.parent)


def in_cluster(*, environ: Mapping[str, str] = os.environ, folder: Path = SERVICE_ACCOUNT) -> Credentials:
    """Credentials of the service account that Kubernetes mounts into every pod; its token is read again when it is
    rotated.

    `KUBERNETES_SERVICE_HOST` is a ClusterIP: whoever programs ClusterIPs on this node must not depend on them, so a
    node agent's or a brain's pod should set that variable (or use a kubeconfig) to name an API server directly.

    Raises KubeconfigError when this is not a pod.
    """
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        _refuse("in-cluster", "KUBERNETES_SERVICE_HOST is not set: this is not a pod", cure="give a kubeconfig file")
    credentials = Credentials(
        server=normalise_server(f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"),
        ca_pem=read_bounded(folder / "ca.crt", "in-cluster.ca.crt"),
        token_file=str(folder / "token"),
    )
    read_token(folder / "token")
    _check(credentials, system_roots=False)
    return credentials


def read_token(path: Path) -> str:
    """The bearer token in a file, without surrounding white space. Raises KubeconfigError."""
    token = read_bounded(path, "tokenFile").decode("latin-1").strip()
    _check_token(token, "tokenFile")
    return token


def read_bounded(path: Path, field: str) -> bytes:
    """Content of a regular file of at most MAX_BYTES. Symbolic links are followed: mounted Secrets consist of them."""
    try:
        with path.open("rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                _refuse(field, f"{path} is not a regular file", cure="name a file")
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        _refuse(field, f"cannot read {path}: {error.strerror}", cure="make it readable for vcproxy")
    if len(data) > MAX_BYTES:
        _refuse(field, f"{path} is larger than {MAX_BYTES} bytes", cure="name the right file")
    return data


# --- what is refused -------------------------------------------------------------------------------------------------

_INLINE = "put the content itself into `{}`"
_PATHS = {
    "certificate-authority": _INLINE.format("certificate-authority-data"),
    "client-certificate": _INLINE.format("client-certificate-data"),
    "client-key": _INLINE.format("client-key-data"),
    "tokenFile": _INLINE.format("token"),
}
_OWN_IDENTITY = "give credentials that are themselves allowed to read Services and EndpointSlices"
_CERT_OR_TOKEN = "use `client-certificate-data` and `client-key-data`, or `token`"
_REFUSED = {
    "exec": ("would run a program", _CERT_OR_TOKEN),
    "auth-provider": ("would run a program", _CERT_OR_TOKEN),
    "username": ("basic authentication is gone from Kubernetes since 1.19", _CERT_OR_TOKEN),
    "password": ("basic authentication is gone from Kubernetes since 1.19", _CERT_OR_TOKEN),
    "as": ("impersonation is refused", _OWN_IDENTITY),
    "as-uid": ("impersonation is refused", _OWN_IDENTITY),
    "as-groups": ("impersonation is refused", _OWN_IDENTITY),
    "as-user-extra": ("impersonation is refused", _OWN_IDENTITY),
    "proxy-url": ("a proxy of the kubeconfig's choosing is refused", "make the API server reachable without it"),
    "insecure-skip-tls-verify": ("would accept any server", "give its CA in `certificate-authority-data`"),
}
_BOOLEANS = ("insecure-skip-tls-verify", "disable-compression")
_CLUSTER_FIELDS = frozenset(
    {"server", "certificate-authority", "certificate-authority-data", "tls-server-name"}
    | {"disable-compression", "extensions"}  # no meaning for vcproxy, which never asks for compression
)
_USER_FIELDS = frozenset(
    {
        "client-certificate",
        "client-certificate-data",
        "client-key",
        "client-key-data",
        "token",
        "tokenFile",
        "extensions",
    }
)


def _refuse_dangerous(section: Mapping[str, object], where: str, known: frozenset[str], *, trusted: bool) -> None:
    for field, value in section.items():
        if value in ("", None, [], {}) or (value == "false" and field in _BOOLEANS):
            continue  # what Go writes for a field that is not set
        if field in _REFUSED:
            reason, cure = _REFUSED[field]
            _refuse(f"{where}.{field}", reason, cure=cure)
        if field in _PATHS and not trusted:
            _refuse(f"{where}.{field}", "paths of files are refused", cure=_PATHS[field])
        if field not in known:
            _refuse(f"{where}.{printable(field, 64)}", "is not a field vcproxy understands", cure="remove it")


def _check(credentials: Credentials, *, system_roots: bool) -> None:
    """What a TLS library would discover later, or with a question on the terminal (an encrypted key), is said here."""
    if credentials.ca_pem or not system_roots:
        _check_authority(credentials.ca_pem, "cluster.certificate-authority-data")
    if bool(credentials.client_cert_pem) != bool(credentials.client_key_pem):
        missing = "client-key-data" if credentials.client_cert_pem else "client-certificate-data"
        _refuse(f"user.{missing}", "is missing", cure="a client certificate needs its key, and a key its certificate")
    if credentials.client_cert_pem:
        _check_certificates(credentials.client_cert_pem, "user.client-certificate-data")
        if b"PRIVATE KEY-----" not in credentials.client_key_pem:
            _refuse("user.client-key-data", "is not a PEM private key", cure="give the key in PEM")
        if b"ENCRYPTED" in credentials.client_key_pem:
            _refuse("user.client-key-data", "is encrypted", cure="give the key without a passphrase")
    if credentials.token:
        _check_token(credentials.token, "user.token")
    if not (credentials.client_cert_pem or credentials.token or credentials.token_file):
        _refuse("user", "holds no credential", cure=_CERT_OR_TOKEN)


def _check_authority(pem: bytes, field: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, ValueError):
        _refuse_certificate(pem, field)


def _check_certificates(pem: bytes, field: str) -> None:
    from cryptography import x509  # 8 MiB, for whoever has certificates

    try:
        for certificate in x509.load_pem_x509_certificates(pem):
            _ = certificate.not_valid_after_utc  # a date that does not exist is an error here, not where it is shown
    except ValueError:
        _refuse_certificate(pem, field)


def _refuse_certificate(pem: bytes, field: str) -> NoReturn:
    _refuse(field, "holds no readable PEM certificate" if pem else "is missing", cure="give certificates in PEM")


def _check_token(token: str, field: str) -> None:
    if not re.fullmatch(r"[\x21-\x7e]{1,16384}", token):
        _refuse(field, "is empty or has characters that no HTTP header may hold", cure="give the token alone")


def _refuse(field: str, reason: str, *, cure: str) -> NoReturn:
    raise KubeconfigError(field, reason, cure=cure)


# --- finding one's way through the document --------------------------------------------------------------------------


def _current_context(document: Mapping[str, object]) -> Mapping[str, object]:
    name = _text(document, "document", "current-context")
    if not name:
        contexts = _sequence(document, "contexts")
        if len(contexts) != 1:
            _refuse("current-context", "is missing", cure="name one of `contexts`")
        name = _text(_mapping(contexts[0], "contexts"), "contexts", "name")
    return _named(document, "contexts", "context", name)


def _named(document: Mapping[str, object], plural: str, singular: str, name: str) -> Mapping[str, object]:
    """The entry of a kubeconfig list that has this name; the first one, as in kubectl."""
    for entry in _sequence(document, plural):
        item = _mapping(entry, plural)
        if _text(item, plural, "name") == name:
            return _mapping(item.get(singular), f"{plural}.{singular}")
    return _refuse(plural, f"no entry is named {printable(name, 64)!r}", cure=f"add the {singular} the context names")


def _mapping(value: object, field: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        _refuse(field, "is not a mapping", cure="give a kubeconfig")
    return value


def _sequence(document: Mapping[str, object], field: str) -> list[object]:
    value = document.get(field)
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        _refuse(field, "is not a list", cure="give a kubeconfig")
    return value


def _text(section: Mapping[str, object], where: str, field: str) -> str:
    value = section.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        _refuse(f"{where}.{field}", "is not text", cure="give a kubeconfig")
    return value


def _data(section: Mapping[str, object], where: str, field: str, *, base: Path | None) -> bytes:
    """PEM bytes of `FIELD-data` (base64), or of the file `FIELD`, which only gets here in a trusted kubeconfig."""
    inline, path = _text(section, where, f"{field}-data"), _text(section, where, field)
    if inline:
        try:
            return base64.b64decode("".join(inline.split()), validate=True)
        except (binascii.Error, ValueError):
            _refuse(f"{where}.{field}-data", "is not base64", cure="encode the PEM file with `base64 -w0`")
    return read_bounded(_resolve(path, base), f"{where}.{field}") if path else b""


def _resolve(path: str, base: Path | None) -> Path:
    return Path(path) if base is None else base / path
