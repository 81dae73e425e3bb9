"""The brain's own certificate and the CA of its nodes, read again when the files change; open streams live on.

gRPC asks for them at each handshake, from threads of its own. Certificate and key are two files and are never replaced
at the same instant, so a pair that does not fit (or a file that cannot be read) leaves the last good ones in use:
a rotation can only ever delay a handshake's view, not break it.
"""

import threading
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from vcproxy.ops import logs

_log = logs.get("certificates")


class CertificateError(Exception):
    """A certificate, key or CA file cannot be used; the text names the file and the problem."""


class ServerCertificates:
    """Three PEM files: certificate (with its chain), key, and the CAs that sign clients. Thread-safe."""

    def __init__(self, *, certificate: Path, key: Path, client_ca: Path) -> None:
        self._files = (certificate, key, client_ca)
        self._lock = threading.Lock()
        self._stamps: tuple[tuple[int, int, int], ...] = ()
        self._current: grpc.ServerCertificateConfiguration | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`; clients without a certificate of the CA are refused. Raises CertificateError."""
        self._stamps = self._stamp()
        self._current = self._load()
        return grpc.dynamic_ssl_server_credentials(self._current, self._fetch, require_client_authentication=True)

    def _fetch(self) -> grpc.ServerCertificateConfiguration:
        with self._lock:
            assert self._current is not None
            try:
                stamps = self._stamp()
                if stamps != self._stamps:
                    self._current = self._load()
                    self._stamps = stamps
                    _log.info("certificates reloaded", certificate=str(self._files[0]))
            except CertificateError as error:
                _log.warning("certificates not reloaded, the last good ones stay in use", error=str(error))
            return self._current

    def _stamp(self) -> tuple[tuple[int, int, int], ...]:
        try:
            stats = [path.stat() for path in self._files]
        except OSError as error:
            raise CertificateError(str(error)) from None
        return tuple((stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in stats)

    def _load(self) -> grpc.ServerCertificateConfiguration:
        try:
            certificate, key, client_ca = (path.read_bytes() for path in self._files)
        except OSError as error:
            raise CertificateError(str(error)) from None
        _check_pair(certificate, key, self._files)
        try:
            x509.load_pem_x509_certificates(client_ca)
        except ValueError as error:
            raise CertificateError(f"{self._files[2]}: no PEM certificates: {error}") from None
        return grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca)


def _check_pair(certificate: bytes, key: bytes, files: tuple[Path, ...]) -> None:
    try:
        public = x509.load_pem_x509_certificates(certificate)[0].public_key()
    except ValueError as error:
        raise CertificateError(f"{files[0]}: no PEM certificate: {error}") from None
    try:
        private = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:
        raise CertificateError(f"{files[1]}: no PEM private key without a passphrase: {error}") from None
    if private.public_key() != public:
        raise CertificateError(f"{files[1]} is not the key of {files[0]}; write both, in any order")
