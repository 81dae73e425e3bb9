"""Root file systems without a container engine: Debian's own bootstrap, commands in a chroot, and image archives.

An image is a stack of layers, each a tar archive of a file tree, and a configuration that names their digests
(OCI image specification). Nothing of that needs an engine, and no registry has to be reached.
"""

import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SUITE = "trixie"
"""The Debian release of the Dockerfile's base image."""

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Where the host's network needs a name server, an index or an authority of its own, so do commands in a chroot. The
# authorities lie where no package has anything: what installs ca-certificates writes to /etc/ssl/certs.
_AUTHORITIES = "/run/host-authorities.pem"
_SHARED = {
    "/etc/resolv.conf": "/etc/resolv.conf",
    "/etc/pip.conf": "/etc/pip.conf",
    "/etc/ssl/certs/ca-certificates.crt": _AUTHORITIES,
}
_ENVIRONMENT = ("PIP_", "http_proxy", "https_proxy", "no_proxy")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


class BuildFailed(RuntimeError):
    """A root file system or an image could not be built; the message has the command's last words."""


def bootstrap(root: Path) -> None:
    """Make `root` a minimal Debian: what `debian:SUITE-slim` is, by Debian's own tool."""
    part = root.with_name(root.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    _run(["nice", "unshare", "--mount", "debootstrap", "--variant=minbase", SUITE, str(part)])
    slim(part)
    part.rename(root)


def copy(root: Path, to: Path) -> None:
    """Make `to` a copy of a root file system."""
    shutil.rmtree(to, ignore_errors=True)
    to.parent.mkdir(parents=True, exist_ok=True)
    _run(["cp", "--archive", "--reflink=auto", str(root), str(to)])


def run(root: Path, command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> None:
    """Run a command in a chroot, with the host's network, as a container engine runs a build step. Raises BuildFailed.

    All mounts are in a namespace that ends with the command, and none lets it write to the host: files of the host are
    mounted read-only, and devices singly.
    """
    script = [f"root={shlex.quote(str(root))}"]
    script += ['mount -t proc proc "$root/proc"', 'mount --bind -o ro "$root/proc/sys" "$root/proc/sys"']
    script += ['mount -t tmpfs run "$root/run"', 'mount -t tmpfs -o mode=755 dev "$root/dev"']
    script += [_bind(f"/dev/{device}", f"/dev/{device}", "rw") for device in _DEVICES]
    script += ['ln -s /proc/self/fd "$root/dev/fd"', 'mkdir -m 1777 "$root/dev/shm"']
    script += [_bind(host, inside, "ro") for host, inside in _SHARED.items() if Path(host).exists()]
    script += ["cd /", 'exec chroot "$root" "$@"']
    variables = {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}
    variables |= {"PATH": PATH, "LC_ALL": "C", "PIP_CERT": _AUTHORITIES, **(environment or {})}
    placeholders = [root / inside.lstrip("/") for inside in _SHARED.values()]
    placeholders = [path for path in placeholders if not path.exists()]
    try:
        shell = ["sh", "-ec", "\n".join(script), "sh", *command]
        _run(["nice", "unshare", "--mount", "--pid", "--fork", "--kill-child", *shell], environment=variables)
    finally:
        for path in placeholders:
            path.unlink(missing_ok=True)


def _bind(host: str, inside: str, access: str) -> str:
    """The shell command that shows a file of the host in "$root"."""
    return f'touch "$root{inside}"; mount --bind -o {access} {host} "$root{inside}"'


def slim(root: Path) -> None:
    """Remove what containers do not need: package lists and archives, documentation, translations."""
    for folder in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"):
        for entry in (root / folder).glob("*"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def archive(
    path: Path, tags: Sequence[str], layers: Sequence[tuple[Path, Sequence[str]]], config: Mapping[str, Any]
) -> None:
    """Write an image as `docker save` does, for `ctr images import`.

    layers: (root, paths in it) each, the lowest first. config: the OCI configuration's `config` (Entrypoint, Env, ...).
    """
    part = path.with_name(path.name + ".part")
    digests = []
    with tarfile.open(part, "w") as image:
        for root, paths in layers:
            layer = part.with_suffix(".layer")
            digests.append(_pack(root, paths, layer))
            image.add(layer, arcname=f"{digests[-1]}.tar")
            layer.unlink()
        data = _configuration(config, digests)
        name = f"{hashlib.sha256(data).hexdigest()}.json"
        _add(image, name, data)
        manifest = [{"Config": name, "RepoTags": list(tags), "Layers": [f"{digest}.tar" for digest in digests]}]
        _add(image, "manifest.json", json.dumps(manifest).encode())
    part.rename(path)


def registry(directory: Path, name: str, tag: str, root: Path, config: Mapping[str, Any]) -> None:
    """Add an image of one layer to a folder from which `agnhost fake-registry-server` serves images."""
    manifests, blobs = directory / name / "manifests", directory / name / "blobs"
    blobs.mkdir(parents=True)
    layer = blobs / "layer"
    digest = _pack(root, ["."], layer)
    size = layer.stat().st_size
    data = _configuration(config, [digest])
    oci = "application/vnd.oci.image"
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{oci}.manifest.v1+json",
        "config": {"mediaType": f"{oci}.config.v1+json", "digest": _sha256(data), "size": len(data)},
        "layers": [{"mediaType": f"{oci}.layer.v1.tar", "digest": f"sha256:{digest}", "size": size}],
    }
    for folder, content in ((blobs, data), (blobs, layer.read_bytes()), (manifests, json.dumps(manifest).encode())):
        algorithm, _, number = _sha256(content).partition(":")
        place = folder / algorithm / number[:2] / number
        place.mkdir(parents=True)
        (place / "data").write_bytes(content)
    layer.unlink()
    (manifests / tag).write_text(_sha256(json.dumps(manifest).encode()))


def _pack(root: Path, paths: Sequence[str], to: Path) -> str:
    """Write a layer; its SHA-256."""
    order = ("--sort=name", "--mtime=@0", "--numeric-owner")
    _run(["tar", *order, "--directory", str(root), "-cf", str(to), *paths])
    with to.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _configuration(config: Mapping[str, Any], layers: Sequence[str]) -> bytes:
    content = {
        "architecture": "amd64",
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": dict(config),
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in layers]},
        "history": [{"created": "1970-01-01T00:00:00Z"} for _ in layers],
    }
    return json.dumps(content).encode()


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _add(image: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    image.addfile(info, io.BytesIO(data))


def _run(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        words = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise BuildFailed(f"{' '.join(command[:6])} ... ended with {done.returncode}:\n{words}")
