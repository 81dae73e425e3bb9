"""How a client proves who it is, and recognises its server: certificates in memory, tokens that rotate."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from vcproxy.kube.errors import KubeconfigError
from vcproxy.kube.kubeconfig import Credentials, read_token


class FileToken:
    """A bearer token in a file that somebody else rotates (projected service account tokens: every hour)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._token = ""

    def read(self) -> str:
        """The token as it is now; the file is only read when it was replaced or written. Raises KubeconfigError."""
        try:
            status = self._path.stat()
        except OSError as error:
            raise KubeconfigError("tokenFile", f"cannot read {self._path}: {error.strerror}", cure="mount it") from None
        seen = (status.st_ino, status.st_mtime_ns, status.st_size)
        if seen != self._seen:
            self._token, self._seen = read_token(self._path), seen
        return self._token


def tls_context(credentials: Credentials) -> ssl.SSLContext:
    """A client's TLS context (1.2 at least) for one API server. The private key never touches a file system.

    OpenSSL reads keys from files only, and a temporary file outlives a killed process; a memfd has no name and dies
    with its last descriptor. Raises KubeconfigError when certificate and key do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if credentials.ca_pem:
        try:
            context.load_verify_locations(cadata=credentials.ca_pem.decode("ascii", "ignore"))
        except ssl.SSLError as error:
            raise KubeconfigError(
                "cluster.certificate-authority-data",
                f"OpenSSL refuses it: {error.reason}",
                cure="give the API server's CA in PEM",
            ) from None
    else:
        context.load_default_certs()
    if credentials.client_cert_pem:
        fd = os.memfd_create("vcproxy-client-key", os.MFD_CLOEXEC)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(credentials.client_key_pem + b"\n" + credentials.client_cert_pem)
            # An encrypted key would make OpenSSL ask on the terminal; an empty passphrase makes it fail.
            context.load_cert_chain(f"/proc/self/fd/{fd}", password="")
        except ssl.SSLError as error:
            raise KubeconfigError(
                "user.client-key-data",
                f"OpenSSL refuses the client's certificate and key: {error.reason}",
                cure="give a certificate and the unencrypted key that belongs to it, both in PEM",
            ) from None
        finally:
            os.close(fd)
    return context
